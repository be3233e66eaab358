"""The arrays that the decode loop of `rlft.cpu.decode` reads and writes. Importing this imports numba."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlft.cpu.decode_layers import VECTOR
from rlft.cpu.decode_steps import BLOCK, STOP
from rlft.cpu.kernels import LANES, ROWS

WIDTH = 4 * VECTOR  # rows in a panel
assert VECTOR % LANES == 0 and BLOCK % ROWS == 0


class Weights(NamedTuple):
    """A policy's parameters, float32. A layer norm is [2, C], weight and bias; of matrices it holds the addresses."""

    wte: np.ndarray  # [V, C]
    wpe: np.ndarray  # [N, C]
    matrices: np.ndarray  # [L, 4] int64 addresses: c_attn, its c_proj, c_fc, its c_proj
    head: int  # address
    ln_1: np.ndarray  # [L, 2, C]
    c_attn: np.ndarray  # [L, 3 C], a bias, as is attn_proj, c_fc and mlp_proj
    attn_proj: np.ndarray  # [L, C]
    ln_2: np.ndarray  # [L, 2, C]
    c_fc: np.ndarray  # [L, 4 C]
    mlp_proj: np.ndarray  # [L, C]
    ln_f: np.ndarray  # [2, C]
    zeros: np.ndarray  # [V], the head's bias


class State(NamedTuple):
    """What a team of T threads reads and writes for R rows; from `lengths` on, these are the caller's arrays."""

    sync: np.ndarray  # [24] int64: threads that have arrived, meetings so far, whether to stop; a cache line for each
    num_open: np.ndarray  # [1] int64, the number of rows that go on
    rows: np.ndarray  # [R] int64, the rows that go on come first
    x: np.ndarray  # [panels, C, width], the residual stream; width: rows in a panel
    y: np.ndarray  # [panels, C, width]
    inner: np.ndarray  # [panels, 4 C, width]
    logits: np.ndarray  # [panels, V, width]
    largest: np.ndarray  # [blocks, panels, width], of the logits in a block of the vocabulary
    mass: np.ndarray  # [blocks, panels, width] float64
    top: np.ndarray  # [T, panels, width], each row's largest logit
    sums: np.ndarray  # [T, 2, width], a thread's working memory, as are query, mixed and scores
    query: np.ndarray  # [T, D]
    mixed: np.ndarray  # [T, D in whole vectors]
    scores: np.ndarray  # [T, slots]
    prompt_keys: np.ndarray  # [P, L, H, tiles, D, LANES]
    prompt_values: np.ndarray  # [P, L, H, S, D in whole vectors]
    own_keys: np.ndarray  # [R, L, H, tiles, D, LANES], the rows' own
    own_values: np.ndarray  # [R, L, H, max_new, D in whole vectors]
    lengths: np.ndarray
    prompt_of_row: np.ndarray
    room: np.ndarray
    draws: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    counts: np.ndarray
    stopped: np.ndarray


NAMES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def matrices_of(policy: nn.Module, *, num_layers: int) -> list[list[Tensor]]:
    """Return each layer's matrices [out, in] and, last, the head, all contiguous."""
    names = [[f"h.{layer}.{name}" for name in NAMES] for layer in range(num_layers)]
    return [[policy.get_parameter(name).contiguous() for name in some] for some in [*names, ["wte.weight"]]]


def weights_of(policy: nn.Module, matrices: list[list[Tensor]]) -> Weights:
    """Return a policy's weights; `matrices` must be kept as long, since the result has only their addresses."""
    of_layers, head = matrices[:-1], matrices[-1][0]

    def one(name: str) -> np.ndarray:
        return policy.get_parameter(name).detach().numpy()

    def stacked(name: str) -> np.ndarray:
        return np.stack([one(f"h.{layer}.{name}") for layer in range(len(of_layers))])

    def norms(name: str) -> np.ndarray:
        return np.stack([stacked(f"{name}.weight"), stacked(f"{name}.bias")], axis=1)

    addresses = np.array([[matrix.data_ptr() for matrix in layer] for layer in of_layers]), head.data_ptr()
    attention = norms("ln_1"), stacked("attn.c_attn.bias"), stacked("attn.c_proj.bias")
    mlp = norms("ln_2"), stacked("mlp.c_fc.bias"), stacked("mlp.c_proj.bias")
    ln_f, zeros = np.stack([one("ln_f.weight"), one("ln_f.bias")]), np.zeros(len(head), dtype=np.float32)
    return Weights(one("wte.weight"), one("wpe.weight"), *addresses, *attention, *mlp, ln_f, zeros)


def _whole(number: int) -> int:
    """Round up to whole vectors."""
    return -(-number // VECTOR) * VECTOR


def prompts_of(keys: list[Tensor], values: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts' keys and values in the layout of `State`, keys in tiles as products with queries read them."""
    stacked = torch.stack(keys, dim=1)
    P, L, H, S, D = stacked.shape
    tiles = F.pad(stacked, (0, 0, 0, -S % LANES)).view(P, L, H, -1, LANES, D).transpose(4, 5).contiguous()
    return tiles.numpy(), F.pad(torch.stack(values, dim=1), (0, _whole(D) - D)).numpy()


def state_of(
    weights: Weights, first_hidden: Tensor, prompts: tuple[np.ndarray, np.ndarray], rows: list[np.ndarray], team: int
) -> State:
    (num_rows, C), (V, max_new) = first_hidden.shape, (len(weights.wte), rows[4].shape[1])
    width = min(WIDTH, _whole(num_rows))
    panels, blocks = -(-num_rows // width), -(-V // BLOCK)
    padded = F.pad(first_hidden, (0, 0, 0, panels * width - num_rows))  # lanes without a row must hold numbers too
    y = padded.view(panels, width, C).transpose(1, 2).contiguous().numpy()
    num_layers, num_heads, _, D, lanes = prompts[0].shape[1:]

    def zeros(*size: int, dtype: Any = np.float32) -> np.ndarray:
        return np.zeros(size, dtype=dtype)

    shared = zeros(STOP + 8, dtype=np.int64), zeros(1, dtype=np.int64), np.arange(num_rows)
    activations = zeros(panels, C, width), y, zeros(panels, 4 * C, width), zeros(panels, V, width)
    of_blocks = zeros(blocks, panels, width), zeros(blocks, panels, width, dtype=np.float64)
    scores = zeros(team, prompts[1].shape[3] + max_new + lanes)
    of_threads = zeros(team, panels, width), zeros(team, 2, width), zeros(team, D), zeros(team, _whole(D)), scores
    keys = np.empty((num_rows, num_layers, num_heads, -(-max_new // lanes), D, lanes), dtype=np.float32)
    values = np.empty((num_rows, num_layers, num_heads, max_new, _whole(D)), dtype=np.float32)
    return State(*shared, *activations, *of_blocks, *of_threads, *prompts, keys, values, *rows)
