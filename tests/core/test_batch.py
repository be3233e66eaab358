from __future__ import annotations

import pytest
import torch

from rlft.core.batch import Batch, Rows, pad
from tests.builders import CPU

PROMPTS = [[1, 2, 3], [4], [5, 6]]
PROMPT_OF_ROW = [0, 0, 1, 1, 1, 2]
COMPLETIONS = [[10, 11], [12, 13, 14, 15, 16], [17], [18, 19, 20], [21, 22, 23, 24], [25, 26]]


@pytest.fixture
def batch() -> Batch:
    """Six rows of three prompts; `advantages` holds 10 * row + time, `weights` the row."""
    prompt_ids, prompt_mask = pad(PROMPTS, device=CPU)
    completion_ids, mask = pad(COMPLETIONS, device=CPU)
    rows = Rows(prompt_ids, prompt_mask.sum(1), torch.tensor(PROMPT_OF_ROW), completion_ids, mask)
    places = 10.0 * torch.arange(6)[:, None] + torch.arange(5)
    states = places[:, :, None].expand(-1, -1, 2)
    return Batch(rows, {"advantages": places, "weights": torch.arange(6.0), "ref_hidden": states})


def unpadded(batch: Batch) -> list[tuple[list[int], list[int], list[float], float]]:
    """Each row as (prompt, completion, its advantages, its weight), read back through masks and indices."""
    rows, out = batch.rows, []
    for i in range(batch.num_rows):
        p, mask = int(rows.prompt_of_row[i]), rows.completion_mask[i]
        prompt = rows.prompt_ids[p, : int(rows.prompt_lengths[p])].tolist()
        advantages = batch.values["advantages"][i][mask].tolist()
        out.append((prompt, rows.completion_ids[i][mask].tolist(), advantages, float(batch.values["weights"][i])))
    return out


def expected_rows() -> list[tuple[list[int], list[int], list[float], float]]:
    return [
        (PROMPTS[p], ids, [10.0 * i + t for t in range(len(ids))], float(i))
        for i, (p, ids) in enumerate(zip(PROMPT_OF_ROW, COMPLETIONS, strict=True))
    ]


def test_batch_counts_rows_and_completion_tokens(batch):
    assert (batch.num_rows, batch.num_tokens) == (6, 17)


def test_slice_takes_its_rows_with_their_prompts_and_cuts_the_padding(batch):
    part = batch.slice(2, 4)  # the first two rows of prompt [4], completions of 1 and 3 tokens
    assert part.rows.prompt_ids.tolist() == [[4]]
    assert part.rows.prompt_of_row.tolist() == [0, 0]
    assert part.rows.completion_ids.tolist() == [[17, 0, 0], [18, 19, 20]]
    assert part.rows.completion_mask.tolist() == [[True, False, False], [True, True, True]]
    assert part.values["advantages"].tolist() == [[20, 21, 22], [30, 31, 32]]
    assert part.values["weights"].tolist() == [2, 3]
    assert part.values["ref_hidden"].shape == (2, 3, 2)


def test_slice_across_prompts_counts_them_from_its_first(batch):
    part = batch.slice(4, 6)
    assert part.rows.prompt_ids.tolist() == [[4, 0], [5, 6]]
    assert part.rows.prompt_lengths.tolist() == [1, 2]
    assert part.rows.prompt_of_row.tolist() == [0, 1]


def test_slice_of_rows_without_a_counted_token_keeps_one_column(batch):
    rows = Rows(**(vars(batch.rows) | {"completion_mask": torch.zeros(6, 5, dtype=torch.bool)}))
    assert Batch(rows).slice(0, 2).rows.completion_ids.shape == (2, 1)


@pytest.mark.parametrize("max_rows", [None, 1, 2, 4, 6, 100])
@pytest.mark.parametrize("max_tokens", [None, 1, 8, 14, 24, 1000])
def test_micro_batches_cover_each_row_once_in_order(batch, max_rows, max_tokens):
    micros = list(batch.micro_batches(max_rows=max_rows, max_tokens=max_tokens))
    assert [row for micro in micros for row in unpadded(micro)] == expected_rows()


@pytest.mark.parametrize(("max_rows", "sizes"), [(None, [6]), (1, [1] * 6), (4, [4, 2]), (3, [3, 3]), (6, [6])])
def test_micro_batches_hold_at_most_max_rows(batch, max_rows, sizes):
    assert [micro.num_rows for micro in batch.micro_batches(max_rows=max_rows)] == sizes


def padded_tokens(micro: Batch) -> int:
    """What a row costs, times the rows: the widest prompt and the widest completion stand side by side."""
    return micro.num_rows * (micro.rows.prompt_ids.shape[1] + micro.rows.completion_ids.shape[1])


@pytest.mark.parametrize("max_tokens", [1, 6, 8, 12, 14, 16, 24, 30, 48])
def test_micro_batches_hold_at_most_max_tokens_with_padding_unless_one_row_is_longer(batch, max_tokens):
    for micro in batch.micro_batches(max_tokens=max_tokens):
        assert padded_tokens(micro) <= max_tokens or micro.num_rows == 1


def test_max_tokens_counts_the_longest_prompt_beside_the_longest_completion_of_another_row():
    prompt_ids, prompt_mask = pad([[1] * 9, [1]], device=CPU)
    completion_ids, mask = pad([[2], [2] * 9], device=CPU)
    rows = Rows(prompt_ids, prompt_mask.sum(1), torch.tensor([0, 1]), completion_ids, mask)
    # 10 tokens each, but side by side both rows are padded to 9 + 9
    assert [m.num_rows for m in Batch(rows).micro_batches(max_tokens=35)] == [1, 1]
    assert [m.num_rows for m in Batch(rows).micro_batches(max_tokens=36)] == [2]


def test_max_tokens_fills_micro_batches_as_far_as_they_go(batch):
    # rows (prompt + completion): 5, 8, 2, 4, 5, 4; two of width 8 make 16, a third would make 24
    assert [m.num_rows for m in batch.micro_batches(max_tokens=16)] == [2, 3, 1]


@pytest.mark.parametrize(("max_rows", "sizes"), [(None, [6]), (1, [2, 2, 2]), (2, [2, 2, 2]), (5, [4, 2]), (6, [6])])
def test_rows_of_a_unit_are_never_divided(batch, max_rows, sizes):
    in_pairs = Batch(batch.rows, batch.values, rows_per_unit=2)
    micros = list(in_pairs.micro_batches(max_rows=max_rows))
    assert [micro.num_rows for micro in micros] == sizes
    assert [row for micro in micros for row in unpadded(micro)] == expected_rows()
    assert {micro.rows_per_unit for micro in micros} == {2}


def test_max_tokens_counts_the_widest_of_a_unit(batch):
    # rows (prompt + completion): 5, 8, 2, 4, 5, 4; pairs of width 8, 1 + 3 and 2 + 4
    in_pairs = Batch(batch.rows, rows_per_unit=2)
    assert [m.num_rows for m in in_pairs.micro_batches(max_tokens=15)] == [2, 2, 2]
    assert [m.num_rows for m in in_pairs.micro_batches(max_tokens=23)] == [2, 2, 2]
    assert [m.num_rows for m in in_pairs.micro_batches(max_tokens=24)] == [2, 4]
    assert [m.num_rows for m in in_pairs.micro_batches(max_tokens=31)] == [2, 4]
    assert [m.num_rows for m in in_pairs.micro_batches(max_tokens=32)] == [4, 2]


def test_max_tokens_counts_a_row_up_to_its_last_counted_token(batch):
    last = batch.rows.completion_mask.clone()
    last[:, :-1] &= ~last[:, 1:]  # only the last token of each row counts
    assert last.sum(1).tolist() == [1] * 6
    sparse = Batch(Rows(**(vars(batch.rows) | {"completion_mask": last})))
    assert [m.num_rows for m in sparse.micro_batches(max_tokens=16)] == [2, 3, 1]


def test_pad_puts_tokens_left_and_zeros_right():
    ids, mask = pad([[7, 8, 9], [], [5]], device=CPU)
    assert ids.tolist() == [[7, 8, 9], [0, 0, 0], [5, 0, 0]]
    assert mask.tolist() == [[True, True, True], [False] * 3, [True, False, False]]
    assert ids.dtype == torch.int64


def test_pad_of_empty_rows_has_one_masked_column():
    ids, mask = pad([[], []], device=CPU)
    assert ids.shape == mask.shape == (2, 1)
    assert not mask.any()


# Rows by length.


def test_rows_of_like_length_come_together_and_keep_what_is_theirs(batch):
    made = batch.by_length()
    assert sorted(unpadded(made), key=lambda row: row[3]) == expected_rows()
    # Longest rows: prompt 0 has 3 + 4 tokens that are read, prompt 1 has 1 + 3, prompt 2 has 2 + 1.
    assert made.values["weights"].tolist() == [5, 2, 3, 4, 0, 1]
    assert made.rows.prompt_of_row.tolist() == [0, 1, 1, 1, 2, 2]
    assert sum(m.rows.completion_ids.numel() for m in made.micro_batches(max_rows=3)) < sum(
        m.rows.completion_ids.numel() for m in batch.micro_batches(max_rows=3)
    )


def test_units_are_not_divided_although_their_prompts_differ():
    prompt_ids, prompt_mask = pad([[1]] * 4, device=CPU)
    completion_ids, mask = pad([[1, 2, 3], [4], [5], [6, 7]], device=CPU)
    rows = Rows(prompt_ids, prompt_mask.sum(1), torch.arange(4), completion_ids, mask)
    made = Batch(rows, {"weights": torch.arange(4.0)}, rows_per_unit=2).by_length()
    assert made.values["weights"].tolist() == [2, 3, 0, 1]
    assert made.rows_per_unit == 2


def test_selected_rows_bring_their_prompts_and_no_others(batch):
    made = batch.select(torch.tensor([1, 5]))
    assert unpadded(made) == [expected_rows()[1], expected_rows()[5]]
    assert made.rows.prompt_lengths.tolist() == [3, 2]  # nothing of the prompt [4] is forwarded
    assert made.rows.prompt_of_row.tolist() == [0, 1]
