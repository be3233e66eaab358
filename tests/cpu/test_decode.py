from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlft.cpu import compiled
from rlft.cpu import decode as loop
from rlft.models.gpt2 import GPT2
from rlft.models.kv.prefix import PrefixCache
from rlft.rollout.engine import fits_cpu
from rlft.rollout.sampling import Sampling
from tests.models.tiny import logits_of, random_ids, tiny

pytest.importorskip("numba")

CPU = torch.device("cpu")
EOS = 4
PROMPTS = random_ids(1, [3, 1, 7, 12, 3])
PROMPT_OF_ROW = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4, 1, 0, 3, 2, 4])  # 19 rows: two vectors
MAX_NEW = 14
Prefilled = tuple[PrefixCache, Tensor]
Result = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True, params=["rows of its own", "a share of each product"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both ways in which threads share the work, and two threads for it."""
    if request.param == "a share of each product":
        monkeypatch.setattr(loop, "ALONE", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def policy_of(seed: int = 2, **sizes: Any) -> GPT2:
    return tiny(seed, dtype=torch.float32, **({"n_positions": 32} | sizes))


def uniforms(num_rows: int = len(PROMPT_OF_ROW), num_tokens: int = MAX_NEW) -> Tensor:
    return torch.rand(num_rows, num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def prefilled(policy: GPT2, prompts: list[list[int]] = PROMPTS) -> Prefilled:
    """Prompts' keys and values, NaN beyond each one's length, and the hidden states that predict the first tokens.

    torch computes them, with other bits on another number of threads: a comparison of the loop's bits starts from one.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    prefix = PrefixCache(lengths)
    hidden = policy(ids, cache=prefix)[torch.arange(len(prompts)), lengths - 1]
    for tensor in (*prefix.keys, *prefix.values):
        tensor.transpose(1, 2)[torch.arange(ids.shape[1])[None] >= lengths[:, None]] = torch.nan
    return prefix, hidden


def decoded(
    policy: GPT2,
    start: Prefilled | None = None,
    *,
    rows: list[int] | None = None,
    draws: Tensor | None = None,
    room: Tensor | None = None,
    **changed: Any,
) -> Result:
    """Decode `rows` (all by default) of the batch from `start`: their draws and room are the batch's."""
    prefix, hidden = prefilled(policy) if start is None else start
    chosen = torch.tensor(rows if rows is not None else list(range(len(PROMPT_OF_ROW))))
    room = policy.context_length - prefix.lengths[PROMPT_OF_ROW] if room is None else room
    prompt_of_row = PROMPT_OF_ROW[chosen]
    settings: dict[str, Any] = {"max_new": MAX_NEW, "temperature": 1.0, "eos_id": EOS} | changed
    draws = draws[chosen] if draws is not None else None
    return loop.decode(policy, prefix, hidden[prompt_of_row], prompt_of_row, room[chosen], draws, **settings)


@torch.no_grad()
def naive(
    policy: GPT2, prompt: list[int], draws: Tensor | None, *, limit: int, temperature: float, eos_id: int | None
) -> tuple[list[int], list[float]]:
    """One row by a whole forward and a loop over the vocabulary for each token."""
    ids, logprobs = list(prompt), []
    while len(logprobs) < limit and (eos_id is None or not logprobs or ids[-1] != eos_id):
        row = (logits_of(policy, torch.tensor([ids]))[0, -1] / temperature).log_softmax(-1)
        token, cumulative = int(row.argmax()), 0.0
        if draws is not None:
            for token, probability in enumerate(row.exp().tolist()):  # noqa: B007
                cumulative += probability
                if cumulative > draws[len(logprobs)]:
                    break
        ids.append(token)
        logprobs.append(float(row[token]))
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize(
    ("sizes", "greedy", "temperature", "eos_id"),
    [
        ({}, False, 1.0, EOS),
        ({}, False, 0.6, EOS),
        ({}, False, 1.7, None),
        ({}, True, 1.0, EOS),
        ({}, True, 0.6, None),
        ({"n_positions": 16}, False, 1.0, None),  # rows reach the end of the context at different lengths
        ({"n_positions": 16}, False, 1.0, EOS),
        ({"n_embd": 30, "n_head": 3, "n_layer": 1}, False, 1.0, EOS),  # no width is a multiple of eight
        ({"n_embd": 6, "n_head": 1, "n_layer": 3}, False, 1.0, EOS),
        ({"vocab_size": 131, "n_embd": 32, "n_head": 2}, False, 1.0, EOS),
        ({"layer_norm_epsilon": 0.3}, False, 1.0, EOS),
    ],
    ids=str,
)
def test_a_row_equals_plain_float64_forwards(
    sizes: dict[str, Any], greedy: bool, temperature: float, eos_id: int | None
) -> None:
    policy, draws = policy_of(**sizes), None if greedy else uniforms()
    exact = copy.deepcopy(policy).double()
    ids, logprobs, counts, stopped = decoded(policy, draws=draws, temperature=temperature, eos_id=eos_id)
    for row, prompt in enumerate(PROMPTS[p] for p in PROMPT_OF_ROW.tolist()):
        limit = min(MAX_NEW, policy.context_length - len(prompt))
        row_draws = draws[row] if draws is not None else None
        want, want_logprobs = naive(exact, prompt, row_draws, limit=limit, temperature=temperature, eos_id=eos_id)
        n = len(want)
        assert counts[row] == n
        assert ids[row].tolist() == want + [0] * (MAX_NEW - n)
        assert bool(stopped[row]) == (want[-1] == eos_id)
        # float32 with sums in another order: up to 1e-5 at logits of several nats
        torch.testing.assert_close(logprobs[row, :n].double(), torch.tensor(want_logprobs).double(), rtol=0, atol=2e-5)
        assert not logprobs[row, n:].any()
    assert (ids.dtype, logprobs.dtype) == (torch.int64, torch.float32)
    assert (counts.dtype, stopped.dtype) == (torch.int64, torch.bool)


def test_rows_end_in_every_way() -> None:
    """So that the comparison above is one of rows that stop, that run out of room, and that go to the end."""
    ids, _, counts, stopped = decoded(policy_of(), draws=uniforms())
    assert 0 < stopped.sum() < len(stopped)
    assert bool((ids[stopped, counts[stopped] - 1] == EOS).all())
    assert (counts[~stopped] == MAX_NEW).all()
    counts = decoded(policy_of(n_positions=16), draws=uniforms(), eos_id=None)[2]
    assert set(counts.tolist()) == {4, 9, 13, MAX_NEW}


def test_room_ends_a_row_that_did_not_stop() -> None:
    policy = policy_of()
    start = prefilled(policy)
    free = decoded(policy, start, draws=uniforms(), eos_id=None)
    room = torch.arange(len(PROMPT_OF_ROW)) % 5 + 1
    ids, logprobs, counts, stopped = decoded(policy, start, draws=uniforms(), room=room, eos_id=None)
    inside = torch.arange(MAX_NEW)[None] < room[:, None]
    assert counts.equal(room) and not stopped.any()
    assert ids.equal(free[0] * inside) and logprobs.equal(free[1] * inside)


@torch.no_grad()
@pytest.mark.parametrize("n_head", [2, 9])  # heads of 66 and 14: more than four vectors, and less than one
def test_many_rows_far_into_the_context_equal_float64_forwards(n_head: int) -> None:
    """More rows than a panel holds, more slots than four vectors: the shapes that small cases never reach."""
    policy = policy_of(n_embd=n_head * 14 if n_head == 9 else 132, n_head=n_head, n_positions=256, vocab_size=131)
    num_rows, max_new, prompts = 150, 100, random_ids(5, [1, 90, 33])
    prefix, hidden = prefilled(policy, prompts)
    prompt_of_row, draws = torch.arange(num_rows) % 3, uniforms(num_rows, max_new)
    room = 3 + 7 * torch.arange(num_rows) % max_new  # rows leave their panels

    def drawn_by(rows: list[int]) -> Result:
        of = prompt_of_row[rows]
        return loop.decode(
            policy, prefix, hidden[of], of, room[rows], draws[rows], max_new=max_new, temperature=0.8, eos_id=None
        )

    ids, logprobs, counts, stopped = drawn_by(list(range(num_rows)))
    assert counts.equal(room.clamp(max=max_new))
    for number, rows in enumerate([[0], [63], [64], [149], list(range(48)), list(range(40, 104)), list(range(100))]):
        torch.set_num_threads(1 + number % 3)
        together = (whole[rows] for whole in (ids, logprobs, counts, stopped))
        assert all(a.equal(b) for a, b in zip(drawn_by(rows), together, strict=True))
    exact = copy.deepcopy(policy).double()
    for row in range(num_rows):
        prompt, n = prompts[prompt_of_row[row]], int(counts[row])
        given = torch.tensor([prompt + ids[row, : n - 1].tolist()])
        want = (logits_of(exact, given)[0, len(prompt) - 1 :] / 0.8).log_softmax(-1)
        drawn = ids[row, :n, None]
        # float32 at logits of up to 26: torch's own is off by up to 1.4e-4
        torch.testing.assert_close(logprobs[row, :n].double(), want.gather(1, drawn)[:, 0], rtol=0, atol=5e-4)
        cumulative = want.exp().cumsum(1)
        above = cumulative.gather(1, drawn)[:, 0]
        below = above - want.exp().gather(1, drawn)[:, 0]
        assert ((below - 5e-4 <= draws[row, :n]) & (draws[row, :n] <= above + 5e-4)).all()


@pytest.mark.parametrize("greedy", [False, True])
def test_a_rows_bits_depend_neither_on_other_rows_nor_on_the_threads(greedy: bool) -> None:
    policy, draws = policy_of(n_embd=20), None if greedy else uniforms()
    start = prefilled(policy)
    batch = decoded(policy, start, draws=draws)
    for row in range(len(PROMPT_OF_ROW)):
        alone = decoded(policy, start, rows=[row], draws=draws)
        assert all(a[0].equal(b[row]) for a, b in zip(alone, batch, strict=True))
    backwards = decoded(policy, start, rows=list(range(len(PROMPT_OF_ROW)))[::-1], draws=draws)
    assert all(a.flip(0).equal(b) for a, b in zip(backwards, batch, strict=True))
    for number in (1, 3, 40):
        torch.set_num_threads(number)
        assert all(a.equal(b) for a, b in zip(decoded(policy, start, draws=draws), batch, strict=True))


def with_logits(logits: list[float]) -> GPT2:
    """A policy whose next-token logits are these after whatever tokens: the last norm gives (1, 0, ...)."""
    policy = policy_of(vocab_size=len(logits))
    with torch.no_grad():
        policy.ln_f.weight.zero_()
        policy.ln_f.bias.zero_()[0] = 1.0
        policy.wte.weight[:, 0] = torch.tensor(logits)
    return policy


def drawn(policy: GPT2, draws: Tensor | None, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """One row of as many tokens as there are draws."""
    prefix, hidden = prefilled(policy, [[1]])
    one, room, max_new = torch.zeros(1, dtype=torch.int64), torch.tensor([50]), 3 if draws is None else len(draws)
    rows = draws[None] if draws is not None else None
    out = loop.decode(policy, prefix, hidden, one, room, rows, max_new=max_new, temperature=temperature, eos_id=None)
    return out[0][0], out[1][0]


def test_the_token_is_the_first_whose_cumulative_probability_exceeds_the_draw() -> None:
    # Probabilities 0, 1/8, 1/8, 0, 3/4, 0; exp(-200) is 0 in float32.
    policy = with_logits([-200.0, 0.0, 0.0, -200.0, float(np.log(6)), -200.0])
    draws = torch.tensor([0.0, 0.1249, 0.1251, 0.2499, 0.2501, 0.9999, 1 - 2**-53], dtype=torch.float64)
    ids, logprobs = drawn(policy, draws)
    assert ids.tolist() == [1, 1, 2, 2, 4, 4, 4]
    expected = torch.tensor([1 / 8, 1 / 8, 1 / 8, 1 / 8, 3 / 4, 3 / 4, 3 / 4]).log()
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-6)  # float32
    ids, logprobs = drawn(policy, draws, temperature=0.5)  # 0, 1/38, 1/38, 0, 36/38, 0
    assert ids.tolist() == [1, 4, 4, 4, 4, 4, 4]
    torch.testing.assert_close(logprobs[:2], torch.tensor([1 / 38, 36 / 38]).log(), rtol=0, atol=1e-6)


def test_a_draw_finds_its_block_of_a_larger_vocabulary() -> None:
    """Five blocks of 48; the only tokens with a probability are in the second and the fourth."""
    logits = [-200.0] * 200
    logits[60] = logits[150] = logits[151] = 0.0
    policy = with_logits(logits)
    draws = torch.tensor([0.0, 0.3333, 0.3334, 0.6666, 0.6667, 1 - 2**-53], dtype=torch.float64)
    ids, logprobs = drawn(policy, draws)
    assert ids.tolist() == [60, 60, 150, 150, 151, 151]
    torch.testing.assert_close(logprobs, torch.full((6,), -np.log(3)).float(), rtol=0, atol=1e-6)
    assert drawn(policy, None)[0].tolist() == [60, 60, 60]
    logits[60] = -np.log(2.0)  # 1/5, 2/5, 2/5
    logits[199] = -np.log(2.0) + 0.0
    policy = with_logits(logits)  # 1/6, 1/3, 1/3, 1/6: the last token of the last block
    assert drawn(policy, torch.tensor([0.8333, 0.8334, 1 - 2**-53], dtype=torch.float64))[0].tolist() == [151, 199, 199]
    assert drawn(policy, torch.tensor([0.2], dtype=torch.float64))[0].tolist() == [150]  # a single new token


def test_greedy_takes_the_first_of_the_largest_logits() -> None:
    ids, logprobs = drawn(with_logits([-3.0, -1.0, -2.0, -1.0, -1.0]), None)
    assert ids.tolist() == [1, 1, 1]
    total = 3 * np.exp(-1) + np.exp(-2) + np.exp(-3)
    torch.testing.assert_close(logprobs, torch.full((3,), -1 - np.log(total)).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("greedy", [False, True])
def test_a_nan_shows_in_the_logprobs_and_not_in_the_ids(greedy: bool) -> None:
    policy = policy_of()
    with torch.no_grad():
        policy.h[1].mlp.c_fc.bias[3] = torch.nan
    ids, logprobs, *_ = decoded(policy, draws=None if greedy else uniforms(), eos_id=None)
    assert logprobs.isnan().all()
    assert ids.min() >= 0 and ids.max() < policy.vocab_size


def test_a_nan_in_one_row_stays_there() -> None:
    policy, draws = policy_of(), uniforms()
    prefix, hidden = prefilled(policy)
    before = decoded(policy, (prefix, hidden), draws=draws)
    first = hidden[PROMPT_OF_ROW].clone()
    first[3] = torch.nan
    room = policy.context_length - prefix.lengths[PROMPT_OF_ROW]
    after = loop.decode(policy, prefix, first, PROMPT_OF_ROW, room, draws, max_new=MAX_NEW, temperature=1.0, eos_id=EOS)
    others = torch.arange(len(room)) != 3
    assert all(a[others].equal(b[others]) for a, b in zip(after, before, strict=True))
    assert after[1][3, 0].isnan()


def test_calls_from_two_threads_do_not_wait_for_each_other_for_ever() -> None:
    policy, draws = policy_of(), uniforms()
    start = prefilled(policy)
    want = decoded(policy, start, draws=draws)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(decoded, policy, start, draws=draws) for _ in range(20)]:
            assert all(a.equal(b) for a, b in zip(done.result(timeout=60), want, strict=True))


def test_a_signal_ends_a_team(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception from a handler comes through before the end, and the threads are free for the next call."""
    from rlft.cpu import decode_state

    monkeypatch.setattr(loop, "ALONE", 0)
    policy, one = policy_of(n_positions=8192, n_embd=64), torch.zeros(1, dtype=torch.int64)
    prefix, hidden = prefilled(policy, [[1]])

    def decode(max_new: int) -> Result:
        return loop.decode(
            policy, prefix, hidden, one, one + max_new, None, max_new=max_new, temperature=1.0, eos_id=None
        )

    want, states, state_of = decode(20), [], decode_state.state_of
    monkeypatch.setattr(decode_state, "state_of", lambda *args: states.append(state_of(*args)) or states[-1])

    def interrupt(number: int, frame: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(InterruptedError):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            decode(8000)  # about a second
        assert all(state.counts[0] < 8000 for state in states)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all(a.equal(b) for a, b in zip(decode(20), want, strict=True))


@pytest.mark.parametrize(("room", "draws", "words"), [(50, None, "positions"), (9, uniforms(1, 3), "draws must be")])
def test_what_would_lead_beyond_an_array_is_refused(room: int, draws: Tensor | None, words: str) -> None:
    policy, one = policy_of(), torch.zeros(1, dtype=torch.int64)
    prefix, hidden = prefilled(policy, [PROMPTS[3]])
    with pytest.raises(ValueError, match=words):
        loop.decode(policy, prefix, hidden, one, one + room, draws, max_new=40, temperature=1.0, eos_id=EOS)


def test_what_it_is_given_stays_as_it_was() -> None:
    policy = policy_of()
    prefix, hidden = prefilled(policy, [PROMPTS[3]])
    given = [hidden, *prefix.keys, *prefix.values, *policy.parameters()]
    before = [tensor.clone() for tensor in given]
    one = torch.zeros(1, dtype=torch.int64)
    loop.decode(policy, prefix, hidden, one, one + 9, uniforms(1), max_new=MAX_NEW, temperature=0.7, eos_id=EOS)
    assert all(a.equal(b) for a, b in zip(given, before, strict=True))


class Subclass(GPT2):
    pass


def test_it_fits_what_it_can_do_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, plain = policy_of(), Sampling(10)
    assert fits_cpu(policy, plain, CPU)
    assert fits_cpu(policy, Sampling(10, greedy=True), CPU)
    assert fits_cpu(policy, Sampling(10, temperature=0.5), CPU)
    assert not fits_cpu(policy, replace(plain, top_k=3), CPU)
    assert not fits_cpu(policy, replace(plain, top_p=0.9), CPU)
    assert not fits_cpu(policy, replace(plain, min_new_tokens=1), CPU)
    assert not fits_cpu(policy, plain, torch.device("cuda"))
    assert not fits_cpu(copy.deepcopy(policy).to("meta"), plain, CPU)
    assert not fits_cpu(copy.deepcopy(policy).double(), plain, CPU)
    assert not fits_cpu(copy.deepcopy(policy).bfloat16(), plain, CPU)
    assert not fits_cpu(Subclass(policy.config), plain, CPU)
    assert not fits_cpu(GPT2(replace(policy.config, is_causal=False)), plain, CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fits_cpu(policy, plain, CPU)
    monkeypatch.setattr(compiled, "is_possible", lambda: False)
    assert not fits_cpu(policy, plain, CPU)
