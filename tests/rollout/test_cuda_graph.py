"""On the CPU a step is called where a GPU would replay its graph; everything else is the same code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from rlft.models.gpt2 import GPT2
from rlft.models.kv.prefix import PrefixCache
from rlft.models.kv.static import StaticCache
from rlft.models.scorer import Scorer
from rlft.rollout import cuda_graph
from rlft.rollout.engine import Rollout, generate
from rlft.rollout.sampling import Sampling
from rlft.rollout.state import Prefilled, RolloutState
from tests.models.tiny import random_ids, tiny

PROMPTS = random_ids(1, [3, 1, 7, 12, 3])
EOS = 4
GROUP = 4
SETTINGS = [
    (Sampling(10), EOS),
    (Sampling(10, temperature=0.6, top_k=5), EOS),
    (Sampling(10, temperature=1.7, min_new_tokens=4), EOS),
    (Sampling(10, greedy=True), EOS),
    (Sampling(10, greedy=True, min_new_tokens=3), EOS),
    (Sampling(10, top_p=0.9), None),
    (Sampling(2), EOS),
    (Sampling(1), EOS),
    (Sampling(50), EOS),  # rows reach the end of the context at different lengths
    (Sampling(50), None),
]


@dataclass
class Seen:
    """What happened on the way: how many rows were kept, and the sizes (rows, slots) and dtypes that were captured."""

    kept: list[int] = field(default_factory=list)
    captured: list[tuple[int, int]] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)
    num_steps: int = 0
    num_looks: int = 0


@pytest.fixture
def by_graph(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Rollout, Seen]]:
    """A rollout whose rows are decoded by `cuda_graph.decode`."""

    def rollout(policy: GPT2, *, check_every: int = 1, capture_bytes: float = 0.0, **changed: Any) -> Any:
        seen = Seen()
        begin, compact, decode = StaticCache.__init__, StaticCache.compact, cuda_graph.decode
        captured, step, look = (getattr(cuda_graph._Steps, n) for n in ("_captured", "_step", "compact"))

        def filled(cache: StaticCache, prefix: PrefixCache, *args: Any, **kwargs: Any) -> None:
            begin(cache, prefix, *args, **kwargs)
            for own in (*cache.keys, *cache.values):
                own[:, :, prefix.keys[0].shape[2] :] = 1e3  # whatever slots hold before a token is in them

        def looking(*args: Any, **_: Any) -> None:
            decode(*args, check_every=check_every)

        def counted_compact(cache: StaticCache, rows: Tensor) -> None:
            seen.kept.append(len(rows))
            compact(cache, rows)

        def counted_capture(steps: Any) -> Callable[[], None]:
            seen.captured.append((len(steps.rows), steps.cache.length))
            cache, products = steps.cache, (steps.head, *steps.weights.values())
            seen.dtypes |= {x.dtype for x in (cache.bias, *cache.keys, *cache.values, *products)}
            return captured(steps)

        def counted_step(steps: Any) -> None:
            seen.num_steps += 1
            step(steps)

        def counted_look(steps: Any, *args: Any, **kwargs: Any) -> None:
            seen.num_looks += 1
            look(steps, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(cuda_graph, "CAPTURE_BYTES", capture_bytes)
            patch.setattr(cuda_graph, "fits", lambda *_: True)
            patch.setattr(cuda_graph, "decode", looking)
            patch.setattr(StaticCache, "__init__", filled)
            patch.setattr(StaticCache, "compact", counted_compact)
            patch.setattr(cuda_graph._Steps, "_captured", counted_capture)
            patch.setattr(cuda_graph._Steps, "_step", counted_step)
            patch.setattr(cuda_graph._Steps, "compact", counted_look)
            return plainly(policy, **changed), seen

    return rollout


def plainly(policy: GPT2, prompts: list[list[int]] = PROMPTS, **changed: Any) -> Rollout:
    settings: dict[str, Any] = {"group_size": GROUP, "sampling": Sampling(10), "eos_id": EOS, "seed": 5, "step": 2}
    return generate(policy, prompts, **(settings | changed))


def assert_equal(got: Rollout, expected: Rollout) -> None:
    assert got.completions() == expected.completions()
    assert got.finish_reasons == expected.finish_reasons
    assert torch.equal(got.rows.completion_mask, expected.rows.completion_mask)
    torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("sampling", "eos_id"), SETTINGS, ids=str)
@pytest.mark.parametrize(("check_every", "capture_bytes"), [(1, 0.0), (3, 0.0), (8, 1e30)])
def test_a_rollout_by_graph_equals_the_plain_loops(
    sampling: Sampling, eos_id: int | None, check_every: int, capture_bytes: float, by_graph: Any
) -> None:
    policy = tiny(2, n_positions=16)
    settings: dict[str, Any] = {"sampling": sampling, "eos_id": eos_id}
    result, seen = by_graph(policy, check_every=check_every, capture_bytes=capture_bytes, **settings)
    assert_equal(result, plainly(policy, **settings))
    assert (seen.num_steps > 0) == (sampling.max_new_tokens > 1)


def test_prompts_of_one_length_and_a_single_row(by_graph: Any) -> None:
    policy = tiny()
    for prompts, group_size in ((random_ids(2, [5, 5, 5]), 1), (random_ids(3, [6]), 1), (random_ids(4, [1]), 9)):
        settings: dict[str, Any] = {"prompts": prompts, "group_size": group_size, "sampling": Sampling(15)}
        assert_equal(by_graph(policy, **settings)[0], plainly(policy, **settings))


def test_rows_move_to_smaller_buckets_and_that_changes_nothing(by_graph: Any) -> None:
    policy = tiny()
    settings: dict[str, Any] = {"sampling": Sampling(20)}
    expected = plainly(policy, **settings)
    moving, seen = by_graph(policy, **settings)
    assert len(seen.kept) > 2 and seen.kept == sorted(seen.kept, reverse=True)
    assert seen.kept[0] == 16 and all(rows & (rows - 1) == 0 for rows in seen.kept)
    assert {rows for rows, _ in seen.captured} == {len(PROMPTS) * GROUP, *seen.kept}
    staying, seen_staying = by_graph(policy, capture_bytes=1e30, **settings)
    assert not seen_staying.kept and seen_staying.captured == [(20, 32)]
    assert_equal(moving, expected)
    assert_equal(staying, expected)


def test_rows_move_only_where_that_saves_more_than_a_capture_costs(by_graph: Any) -> None:
    policy = tiny()
    settings: dict[str, Any] = {"sampling": Sampling(20)}
    _, free = by_graph(policy, **settings)
    row_bytes = 2 * 2 * 16 * 8  # of a slot: keys and values, layers, width, float64
    _, dear = by_graph(policy, capture_bytes=4.0 * 10 * 24 * row_bytes, **settings)
    assert 0 < len(dear.kept) < len(free.kept)


def test_attention_is_given_more_slots_as_they_fill(by_graph: Any) -> None:
    policy = tiny(n_positions=64)
    settings: dict[str, Any] = {"sampling": Sampling(52), "eos_id": None}
    result, seen = by_graph(policy, **settings)
    assert [length for _, length in seen.captured] == [32, 48, 64]
    assert seen.num_steps == 51  # the last token is drawn and not read
    assert_equal(result, plainly(policy, **settings))


def test_decoding_stops_when_no_row_is_open_and_looks_only_if_one_may_end(by_graph: Any) -> None:
    policy = tiny(3)
    result, seen = by_graph(policy, sampling=Sampling(20))
    assert seen.num_steps == int(result.rows.completion_mask.sum(dim=1).max()) < 19
    _, seen = by_graph(policy, prompts=[[3] * 22, [3] * 20], sampling=Sampling(20), eos_id=None)
    assert seen.num_steps == 3 and seen.num_looks == 3
    _, seen = by_graph(policy, prompts=[[3] * 12] * 2, sampling=Sampling(20), eos_id=None)
    assert seen.num_steps == 11 and seen.num_looks == 0  # all end together, at the context's end


def test_rows_may_be_decoded_some_after_others(by_graph: Any) -> None:
    policy = tiny()
    settings: dict[str, Any] = {"sampling": Sampling(12, max_rows=6)}
    assert_equal(by_graph(policy, **settings)[0], plainly(policy, **settings))


class NothingFromTheHost(TorchDispatchMode):
    """Refuses what copies between host and device; what depends on data fails on the meta device by itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, out) if isinstance(x, Tensor)]
        is_copy = func.name() in ("aten::_to_copy", "aten::copy_")
        if is_copy and len({x.device.type for x in tensors}) > 1:
            raise RuntimeError(f"{func.name()} between devices")
        return out


@pytest.mark.parametrize(("sampling", "eos_id"), SETTINGS[:7], ids=str)
def test_a_step_asks_nothing_of_the_host(
    sampling: Sampling, eos_id: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for the GPU, or copies from the host, cannot be captured: the whole step runs without any data."""
    taken, policy = [], tiny()
    whole = copy.deepcopy(policy).to("meta")

    def decode(_: GPT2, new: Prefilled, state: RolloutState, *, check_every: int) -> None:
        cache = StaticCache(new.prefix, new.prompt_of_row, max_new_tokens=10, shape=policy.cache_shape)
        cache.length = cache.num_slots
        steps = cuda_graph._Steps(policy, new, state, cache)
        for part in (steps, state, cache):
            for name, value in vars(part).items():
                if isinstance(value, Tensor):
                    setattr(part, name, value.to("meta"))
        cache.keys, cache.values = ([x.to("meta") for x in own] for own in (cache.keys, cache.values))
        steps.policy, steps.weights = whole, {name: x.to("meta") for name, x in steps.weights.items()}
        with NothingFromTheHost():
            steps._step()
        taken.append(steps)
        raise KeyboardInterrupt  # there is no result

    monkeypatch.setattr(cuda_graph, "fits", lambda *_: True)
    monkeypatch.setattr(cuda_graph, "decode", decode)
    with pytest.raises(KeyboardInterrupt):
        plainly(policy, sampling=sampling, eos_id=eos_id)
    assert len(taken) == 1


def test_what_a_graph_reads_stays_where_it_is(by_graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one capture to the next every step finds and leaves its state at the same addresses."""
    step: Callable[[Any], None] = cuda_graph._Steps._step
    places: dict[tuple[int, int], list[int]] = {}

    def watched(steps: Any) -> None:
        for when in ("before", "after"):
            own = (steps.rows, steps.done, steps.position, steps.hidden, steps.head, steps.cache.bias, steps.cache.slot)
            state = (steps.state.ids, steps.state.logprobs, steps.state.counts, steps.state.stopped)
            addresses = [x.data_ptr() for x in (*own, *state, *steps.cache.keys, *steps.cache.values)]
            assert places.setdefault((len(steps.rows), steps.cache.length), addresses) == addresses
            if when == "before":
                step(steps)

    monkeypatch.setattr(cuda_graph._Steps, "_step", watched)
    _, seen = by_graph(tiny(), sampling=Sampling(20))
    assert set(places) == set(seen.captured)


def test_weights_that_are_cast_beforehand_change_no_bit() -> None:
    policy = tiny(dtype=torch.float32, n_embd=32)
    prompts = torch.tensor(random_ids(3, [9, 9]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = policy(prompts)
        weights = {name: cuda_graph._cast(p) for name, p in policy.named_parameters() if ".c_" in name}
        assert {p.dtype for p in weights.values()} == {torch.bfloat16} and len(weights) == 16
        assert torch.equal(functional_call(policy, weights, (prompts,)), expected)
        assert cuda_graph._cast(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert cuda_graph._cast(policy.head_weight) is policy.head_weight


def test_under_autocast_cache_and_weights_are_bfloat16_and_the_logprobs_the_scorers(by_graph: Any) -> None:
    policy = tiny(dtype=torch.float32, n_embd=32).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        result, seen = by_graph(policy, sampling=Sampling(8))
        logprobs = Scorer(policy)(result.rows).logprobs
    exact = Scorer(policy)(result.rows).logprobs
    assert seen.dtypes == {torch.bfloat16}
    assert result.logprobs.dtype == torch.float32
    distance = (result.logprobs - logprobs).abs()  # zero on a machine whose kernels sum both in one order
    assert float(distance.max()) < 0.2 and float(distance.mean()) < 0.02  # 8 bits of logits of several nats
    assert float((result.logprobs - exact).abs().max()) > 1e-3  # float32's: it is not those that are compared


def test_it_fits_a_policy_that_leaves_attention_to_its_cache_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny()
    assert cuda_graph.fits(policy, torch.device("cuda")) and not cuda_graph.fits(policy, torch.device("cpu"))
    monkeypatch.setattr(GPT2, "takes_packed", False)
    assert not cuda_graph.fits(policy, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
@pytest.mark.parametrize(("sampling", "eos_id"), SETTINGS, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_graphs_on_a_gpu_equal_the_plain_loop_there(
    sampling: Sampling,
    eos_id: int | None,
    dtype: torch.dtype,
    bound: float,
    by_graph: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_graph, "fits", lambda *_: False)  # `plainly` takes the plain loop, on a GPU as well
    policy = tiny(2, n_positions=16, dtype=dtype).cuda()
    settings: dict[str, Any] = {"sampling": sampling, "eos_id": eos_id}
    expected = plainly(policy, **settings)
    for capture_bytes in (0.0, 1e30):
        result, seen = by_graph(policy, capture_bytes=capture_bytes, check_every=2, **settings)
        assert result.completions() == expected.completions()
        assert result.finish_reasons == expected.finish_reasons
        torch.testing.assert_close(result.logprobs, expected.logprobs, rtol=0, atol=bound)
        assert seen.num_steps == 2 * len(seen.captured)  # one to warm up and one to capture; the others are replayed
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.7)  # as an optimizer would, in place
    assert by_graph(policy, **settings)[0].completions() == plainly(policy, **settings).completions()
