"""What one GPU does: first whether it is right, then how fast, beside the limits that the card's own rates set.

    python -m benchmarks.gpu            # a GPU with 80 GB, some minutes; writes benchmarks/gpu.json
    python -m benchmarks.gpu --cpu      # everything at toy sizes on the CPU, to try the script itself

Weights and prompts are random: no network, no data set. Limits: a decoding step must read every matrix once in bf16 and
the keys and values of the tokens that are there, a group's prompt once; an update takes 6 operations for each parameter
and token read. Both are divided by what the same card does in a large copy and a large matrix product. Sampling,
attention's products and the host are not in the limits. Times are medians, with the device waited for; a rollout's
captures count as its decoding.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import ours
from rlft.core.batch import Rows
from rlft.core.metrics import Clock
from rlft.functional.logprobs import token_logprobs
from rlft.models.gpt2 import GPT2, GPT2Config
from rlft.models.scorer import Scorer
from rlft.rollout import cuda_graph
from rlft.rollout.engine import Rollout, generate
from rlft.rollout.sampling import Sampling, uniforms

GROUP, NUM_NEW, TEMPERATURE, EOS = 4, 40, 0.8, 3  # of the checks


@dataclass(frozen=True)
class Sizes:
    """What is timed."""

    device: str = "cuda"
    model: GPT2Config = GPT2Config()  # noqa: RUF009  (frozen)
    rows: int = 512  # that decode together
    prompt: int = 128
    new: int = 256  # so that the context is 256 tokens on average
    update_rows: int = 64  # of 256 tokens
    update_tokens: int = 256
    product: int = 8192  # n of the n x n bf16 matrices
    copied: int = 2**32  # bytes
    step: str = "--preset gpt2 --hardware gpu --prompts 256 --group 8 --plen 64 --clen 256"  # of GRPO
    micro_batch_tokens: int = 65536
    repeats: int = 5


TOY = Sizes(
    device="cpu", model=GPT2Config(97, 64, 32, 2, 2), rows=8, prompt=12, new=24, update_rows=4, update_tokens=32,
    product=256, copied=2**20, step="--preset tiny --prompts 2 --group 4 --plen 8 --clen 12", micro_batch_tokens=100,
)  # fmt: skip


class CheckError(Exception):
    """A result is wrong: nothing is timed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="toy sizes on the CPU; writes no file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "gpu.json")
    parser.add_argument("--profile", action="store_true", help="also the kernels that decoding and an update spend on")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU; --cpu runs this script at toy sizes on the CPU")
        return 2
    sizes = TOY if args.cpu else Sizes()
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        checks = checked(torch.device(sizes.device))
    except CheckError as error:
        print(f"WRONG, so nothing is timed: {error}")
        return 1
    card = "the CPU" if args.cpu else torch.cuda.get_device_name()
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "card": card, "torch": torch.__version__,
        "cuda": torch.version.cuda, "sizes": dataclasses.asdict(sizes), "checks": checks,
    }  # fmt: skip
    result["rates"], result["rows"] = timed(sizes, is_profiled=args.profile)
    print(rendered(result))
    if not args.cpu:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


# Correctness


def checked(device: torch.device) -> dict[str, float]:
    """Run every check, print what each found, and return it; raises `CheckError` at the first that fails."""
    found: dict[str, float] = {}
    for check in (graph_equals_plain_loop, gpu_equals_cpu, sampler_equals_scorer, shared_prompts, chunked_head):
        for name, (value, bound) in check(device).items():
            found[name] = value
            print(f"{name}: {value:.2g}" + ("" if bound is None else f", at most {bound:.0e}"), flush=True)
            if bound is not None and not value <= bound:
                raise CheckError(f"{name} is {value:.3g}, more than {bound:.0e}")
    return found


def graph_equals_plain_loop(device: torch.device) -> dict[str, tuple[float, float | None]]:
    found: dict[str, tuple[float, float | None]] = {}
    bounds = {torch.float64: 1e-10, torch.float32: 1e-4}
    if device.type == "cpu":
        del bounds[torch.float32]  # there a small policy in float32 has a decoder of its own
    for dtype, bound in bounds.items():
        policy = small(dtype).to(device)
        with decoding("plain"):
            expected = rollout(policy)
        for capture_bytes in (0.0, 1e30):  # rows and slots change as often as they may, and never
            with decoding("graph", capture_bytes=capture_bytes) as calls:
                got = rollout(policy)
            if not calls:
                raise CheckError("generate did not call rlft.rollout.cuda_graph.decode: rlft/rollout/engine.py must")
            far = apart(got, expected)
            name = f"graph and plain loop, {str(dtype).removeprefix('torch.')}"
            found[name] = (max(far, found.get(name, (0.0, None))[0]), bound)
    return found


def gpu_equals_cpu(device: torch.device) -> dict[str, tuple[float, float | None]]:
    policy = small(torch.float32)
    with decoding("plain"):
        expected = rollout(policy)
    return {f"{device.type} and cpu, float32": (apart(rollout(policy.to(device)), expected), 1e-4)}


def sampler_equals_scorer(device: torch.device) -> dict[str, tuple[float, float | None]]:
    policy = small(torch.float32).to(device).requires_grad_(False)
    exact = rollout(policy)
    far = (Scorer(policy)(exact.rows, temperature=TEMPERATURE).logprobs - exact.logprobs).abs().max()
    with autocast(device):
        rounded = rollout(policy)
        logprobs = Scorer(policy)(rounded.rows, temperature=TEMPERATURE).logprobs
    far_rounded = (logprobs - rounded.logprobs).abs().max()
    name = "sampler's and scorer's logprobs"
    return {f"{name}, float32": (float(far), 1e-3), f"{name}, bf16 autocast": (float(far_rounded), None)}


def shared_prompts(device: torch.device) -> dict[str, tuple[float, float | None]]:
    """The gradient of a weighted sum of logprobs, with each prompt forwarded once and with one copy for each row."""
    policy = small(torch.float64).to(device)
    rows = rollout(policy).rows
    own = dataclasses.replace(
        rows,
        prompt_ids=rows.prompt_ids[rows.prompt_of_row],
        prompt_lengths=rows.prompt_lengths[rows.prompt_of_row],
        prompt_of_row=torch.arange(len(rows.prompt_of_row), device=device),
    )
    gradients = []
    for given in (rows, own):
        logprobs = Scorer(policy)(given).logprobs
        weights = torch.arange(logprobs.numel(), device=device).view(logprobs.shape).sin()
        gradients.append(torch.autograd.grad((logprobs * weights).sum(), list(policy.parameters())))
    return {"gradients with and without shared prompts, float64": (relative(*gradients), 1e-10)}


def chunked_head(device: torch.device) -> dict[str, tuple[float, float | None]]:
    draws = torch.Generator().manual_seed(0)
    hidden, weight, scale = (
        torch.randn(size, generator=draws, dtype=torch.float64).to(device).requires_grad_()
        for size in ((50, 24), (301, 24), (50,))
    )
    ids = torch.randint(0, 301, (50,), generator=draws).to(device)
    logprobs, entropy = token_logprobs(hidden, weight, ids, temperature=0.7, entropy_grad=True, chunk_rows=7)
    whole = (hidden @ weight.T / 0.7).log_softmax(-1)
    plain, plain_entropy = whole.gather(1, ids[:, None])[:, 0], -(whole.exp() * whole).sum(-1)
    results = []
    for a, b in ((logprobs, entropy), (plain, plain_entropy)):
        results.append((a, b, *torch.autograd.grad((scale.detach() * (a + 0.3 * b)).sum(), (hidden, weight))))
    return {"chunked head and plain log-softmax, float64": (relative(*results), 1e-10)}


def small(dtype: torch.dtype) -> GPT2:
    """A policy with logits of several nats."""
    return GPT2(GPT2Config(97, 64, 64, 2, 2), seed=1, initializer_range=0.3).to(dtype)


def small_prompts() -> list[list[int]]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randint(4, 97, (n,), generator=draws).tolist() for n in (5, 1, 17, 40, 5, 9, 30, 2)]


def rollout(policy: GPT2) -> Rollout:
    sampling = Sampling(NUM_NEW, temperature=TEMPERATURE)
    return generate(policy, small_prompts(), group_size=GROUP, sampling=sampling, eos_id=EOS, seed=7)


def apart(got: Rollout, expected: Rollout) -> float:
    """Return the largest distance of logprobs of the same tokens; rows part at ties only, or this raises."""
    far = 0.0
    pairs = zip(got.completions(), expected.completions(), strict=True)
    for row, (mine, theirs) in enumerate(pairs):
        at = next((t for t, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
        if at is None and len(mine) != len(theirs):
            raise CheckError(f"row {row} ends after {len(mine)} tokens, not {len(theirs)}")
        if at is not None:
            check_tie(row, mine[:at], mine[at], theirs[at])
        count = len(mine) if at is None else at
        distance = (got.logprobs[row, :count].cpu() - expected.logprobs[row, :count].cpu()).abs()
        far = max(far, float(distance.max()) if count else 0.0)
    return far


@torch.no_grad()
def check_tie(row: int, drawn: list[int], token: int, other: int) -> None:
    """Refuse two tokens after the same ones, unless the draw lies between them up to rounding."""
    policy, (prompt, member) = small(torch.float64), divmod(row, GROUP)
    draws = uniforms(seed=7, stream="rollout", step=0, prompts=[prompt], members=[member], num_tokens=NUM_NEW)[0]
    logits = policy(torch.tensor([small_prompts()[prompt] + drawn]))[0, -1] @ policy.head_weight.t()
    mass = (logits / TEMPERATURE).softmax(-1)
    for one in (token, other):
        end = float(mass[: one + 1].sum())
        if not end - float(mass[one]) - 1e-5 <= draws[len(drawn)] <= end + 1e-5:
            raise CheckError(f"row {row} drew {token} and {other} as its token {len(drawn)}, which is no tie")


def relative(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest ||got - expected|| / ||expected|| of several tensors."""
    pairs = zip(got, expected, strict=True)
    return max(float(((a - b).norm() / b.norm().clamp(min=1e-300)).detach()) for a, b in pairs)


@contextmanager
def decoding(way: str, *, capture_bytes: float | None = None) -> Iterator[list[float]]:
    """Have `generate` decode by "graph" or by its "plain" loop; yields the seconds of each capture."""
    captures: list[float] = []
    captured = cuda_graph._Steps._captured

    def counted(steps: Any) -> Callable[[], None]:
        wait(steps.rows.device)
        began = time.perf_counter()
        repeat = captured(steps)
        wait(steps.rows.device)
        captures.append(time.perf_counter() - began)
        return repeat

    fits = mock.patch.object(cuda_graph, "fits", lambda policy, device: way == "graph")
    costs = mock.patch.object(
        cuda_graph, "CAPTURE_BYTES", cuda_graph.CAPTURE_BYTES if capture_bytes is None else capture_bytes
    )
    with fits, costs, mock.patch.object(cuda_graph._Steps, "_captured", counted):
        yield captures


# Timing


def timed(sizes: Sizes, *, is_profiled: bool) -> tuple[dict[str, float], list[dict]]:
    """Return the card's rates, and a row for each piece of work."""
    device = torch.device(sizes.device)
    rates = measured_rates(sizes, device)
    policy = GPT2(sizes.model).to(device)
    matrices = policy.num_parameters() - policy.wpe.weight.numel()  # the embedding is the head
    slot = 2 * 2 * sizes.model.n_layer * sizes.model.n_embd  # bytes of a token's keys and values in bf16
    rows = []
    for number in (sizes.rows, 1):
        context = sizes.prompt + sizes.new / 2
        limit = number * rates["bytes/s"] / (2 * matrices + number * context * slot)
        rows += decode_rows(policy, sizes, number, limit)
    rows.append(update_row(policy, sizes, rates["flop/s"] / (6 * policy.num_parameters())))
    if is_profiled:
        profiled(policy, sizes)
    num_parameters = policy.num_parameters()
    del policy
    P, G, S, T = (int(sizes.step.split(f"--{name} ")[1].split()[0]) for name in ("prompts", "group", "plen", "clen"))
    B = P * G
    decode = T * (2 * matrices + (P * S + B * T / 2) * slot) / rates["bytes/s"]
    update = (6 * (P * S + B * T) + 2 * P * S) * num_parameters / rates["flop/s"]  # and the prefill
    rows.append(grpo_row(sizes, decode + update))
    return rates, rows


def measured_rates(sizes: Sizes, device: torch.device) -> dict[str, float]:
    n = sizes.product
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 255, (sizes.copied,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = statistics.median(seconds(lambda: a @ b, device, repeats=20))
    copied = statistics.median(seconds(lambda: target.copy_(source), device, repeats=20))
    return {"flop/s": 2 * n**3 / product, "bytes/s": 2 * sizes.copied / copied}


def decode_rows(policy: GPT2, sizes: Sizes, number: int, limit: float) -> list[dict]:
    """Decode by graph under autocast and with a bf16 copy of the policy, and by the plain loop."""
    device = torch.device(sizes.device)
    draws = torch.Generator().manual_seed(2)
    prompts = torch.randint(0, policy.vocab_size, (number, sizes.prompt), generator=draws).tolist()
    rounded = copy.deepcopy(policy).to(torch.bfloat16).requires_grad_(False)
    made = []
    for name, model, way in (
        ("graph, autocast", policy, "graph"),
        ("graph, bf16 copy", rounded, "graph"),
        ("plain loop, autocast", policy, "plain"),
    ):
        times, captures, drawn = [], [], None
        start_peak(device)
        for _ in range(sizes.repeats + 1):
            clock = Clock(device)
            with decoding(way) as captured, autocast(device, enabled=model is policy):
                drawn = generate(
                    model, prompts, group_size=1, sampling=Sampling(sizes.new), eos_id=None, seed=0, clock=clock
                )
            times.append(clock.seconds["decode"])
            captures += captured
        assert drawn is not None
        row = measured(f"decode {number} rows, {name}", "tokens/s", number * sizes.new, times[1:], limit, device)
        distance = distance_to_scorer(policy, drawn, device)
        extra = {"mean_distance_to_scorer": float(distance.mean()), "max_distance_to_scorer": float(distance.max())}
        if captures:
            extra |= {"captures": len(captures) / len(times), "capture_s": statistics.median(captures)}
        made.append(row | extra)
    return made


@torch.no_grad()
def distance_to_scorer(policy: GPT2, drawn: Rollout, device: torch.device) -> Tensor:
    """Return |sampler's logprob - the autocast scorer's| of each token: what an update's ratio would start with."""
    rows, parts = drawn.rows, []
    for first in range(0, len(rows.prompt_ids), 64):
        part = slice(first, first + 64)
        own = torch.arange(len(rows.prompt_ids[part]), device=device)
        some = Rows(rows.prompt_ids[part], rows.prompt_lengths[part], own, *(
            x[part] for x in (rows.completion_ids, rows.completion_mask)
        ))  # fmt: skip
        with autocast(device):
            parts.append((Scorer(policy)(some).logprobs - drawn.logprobs[part]).abs())
    return torch.cat(parts)


def update_row(policy: GPT2, sizes: Sizes, limit: float) -> dict:
    device, B, T = torch.device(sizes.device), sizes.update_rows, sizes.update_tokens
    update = an_update(policy, sizes)
    start_peak(device)
    times = seconds(update, device, repeats=sizes.repeats)
    return measured(f"update, {B} rows of {T}", "tokens/s", B * T, times, limit, device)


def an_update(policy: GPT2, sizes: Sizes) -> Callable[[], None]:
    """Return a step of supervised training: forward, backward, fused AdamW."""
    device, B, T = torch.device(sizes.device), sizes.update_rows, sizes.update_tokens
    ids = torch.randint(0, policy.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(3)).to(device)
    rows = Rows(
        ids[:, :1], torch.ones(B, dtype=torch.int64, device=device), torch.arange(B, device=device), ids[:, 1:],
        torch.ones(B, T, dtype=torch.bool, device=device),
    )  # fmt: skip
    optimizer = policy.configure_optimizers(learning_rate=1e-5, weight_decay=0.0, betas=(0.9, 0.99))
    scorer = Scorer(policy).train()

    def update() -> None:
        with autocast(device):
            loss = -scorer(rows).logprobs.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def grpo_row(sizes: Sizes, limit: float) -> dict:
    """A whole step of the composed trainer, by `benchmarks.ours`."""
    device, out, overrides = torch.device(sizes.device), io.StringIO(), ours.overrides
    flags = f"{sizes.step} --steps {sizes.repeats} --warmup 2".split()
    more = f"micro_batch_tokens={sizes.micro_batch_tokens}"
    start_peak(device)
    with (
        mock.patch.object(sys, "argv", ["ours", "grpo", *flags]),
        mock.patch.object(ours, "overrides", lambda args, directory: [*overrides(args, directory), more]),
        redirect_stdout(out),
    ):
        ours.main()
    made = json.loads(out.getvalue().splitlines()[-1])
    return measured(f"GRPO step, {sizes.step}", "s", 1, made["steps"], limit, device) | {"parts": made["parts"]}


def measured(name: str, unit: str, work: int, times: list[float], limit: float, device: torch.device) -> dict:
    """Return a row; `limit` is in tokens/s, or in seconds where that is the unit."""
    median = statistics.median(times)
    value = median if unit == "s" else work / median
    share = limit / value if unit == "s" else value / limit
    row = {"work": name, "measured": value, "unit": unit, "limit": limit, "share": share, "seconds": times}
    print(f"{name}: {value:,.4g} {unit}", flush=True)
    return row | {"peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0}


def seconds(function: Callable[[], Any], device: torch.device, *, repeats: int) -> list[float]:
    """Return the seconds of each call after three of warm-up."""
    times = []
    for _ in range(repeats + 3):
        wait(device)
        began = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - began)
    return times[3:]


def autocast(device: torch.device, *, enabled: bool = True) -> AbstractContextManager:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def start_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def profiled(policy: GPT2, sizes: Sizes) -> None:
    """Print the kernels that took longest in a rollout of `sizes.rows` rows and in an update."""
    device = torch.device(sizes.device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    prompts, sampling = [[1] * sizes.prompt] * sizes.rows, Sampling(sizes.new)
    update = an_update(policy, sizes)

    def decode() -> None:
        with autocast(device):
            generate(policy, prompts, group_size=1, sampling=sampling, eos_id=None, seed=0)

    for name, work in (("rollout", decode), ("update", update)):
        work()
        with torch.profiler.profile(activities=activities) as profile:
            work()
            wait(device)
        order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(f"{name}\n{profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=70)}")


def rendered(result: dict) -> str:
    rates = result["rates"]
    lines = [
        f"{result['card']}, torch {result['torch']}: {rates['flop/s'] / 1e12:,.4g} TFLOP/s in bf16, "
        f"{rates['bytes/s'] / 1e12:,.4g} TB/s",
        "| work | measured | limit | share of it | peak memory, GB |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        pair = (f"{row[name]:,.4g} {row['unit']}" for name in ("measured", "limit"))
        lines.append(f"| {row['work']} | {' | '.join(pair)} | {row['share']:.1%} | {row['peak_gb']:.3g} |")
    captures = [row["capture_s"] for row in result["rows"] if "capture_s" in row]
    if captures:
        read = statistics.median(captures) * rates["bytes/s"]
        lines.append(
            f"A capture takes {1e3 * statistics.median(captures):.3g} ms, in which {read:.2g} bytes could be read; "
            f"rlft.rollout.cuda_graph.CAPTURE_BYTES is {cuda_graph.CAPTURE_BYTES:.2g}."
        )
    distances = [
        f"{row['mean_distance_to_scorer']:.2g} (at most {row['max_distance_to_scorer']:.2g}) in {row['work']}"
        for row in result["rows"]
        if "mean_distance_to_scorer" in row
    ]
    return "\n".join([*lines, "Sampler's logprobs are from the scorer's, on average: " + "; ".join(distances)])


if __name__ == "__main__":
    raise SystemExit(main())
