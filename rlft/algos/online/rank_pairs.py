"""Pairs for offline training, ranked by a reward: a policy's samples, of which the best and the worst of a group."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from rlft.algos.offline.examples import check_sizes
from rlft.algos.online.rollouts import Rollouts
from rlft.core.errors import ConfigError, RewardError
from rlft.core.metrics import Clock
from rlft.data.kinds import Kind
from rlft.data.prompts import PromptData
from rlft.functional.preference import best_and_worst
from rlft.models.base import CausalLM
from rlft.rewards.compose import RewardSum
from rlft.rollout.sampling import Sampling
from rlft.text.tokenizer import Tokenizer

MIN_PAIRS_PER_GROUP = 0.01  # fewer groups with spread than this, over MIN_GROUPS, and no file will ever be full
MIN_GROUPS = 500


class RankPairs:
    """Writes pairs in TRL's columns: prompt, chosen, rejected, and the rewards as score_chosen and score_rejected.

    chosen_ends and rejected_ends say whether the policy ended the text, for `rlft.data.preferences.PreferenceData`.

    Built by rlft/build.py in an algorithm's place, from the same settings; it trains nothing. A group is sampled for
    each training prompt, in the order of a run with the same seed. One without spread is passed over.

    Arguments (beside the run's objects):
        path: the JSON-lines file to write; it must not exist, and appears when it is whole.
        num_pairs: how many to write.
        prompts_per_step, group_size: prompts sampled at once; samples of each.
    """

    reads = (Kind.PROMPTS, Kind.CONTEXTS)

    def __init__(
        self,
        *,
        policy: CausalLM,
        rewards: RewardSum,
        data: PromptData,
        tokenizer: Tokenizer,
        sampling: Sampling,
        seed: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        world_size: int,
        clock: Clock,
        path: str,
        num_pairs: int,
        prompts_per_step: int,
        group_size: int,
    ) -> None:
        self.check(
            has_reference=False, world_size=world_size, path=path, num_pairs=num_pairs, group_size=group_size,
            prompts_per_step=prompts_per_step,
        )  # fmt: skip
        self.path, self.num_pairs, self.group_size, self.tokenizer = Path(path), num_pairs, group_size, tokenizer
        self.rollouts = Rollouts(
            policy=policy, rewards=rewards, data=data, tokenizer=tokenizer, sampling=sampling, seed=seed, device=device,
            autocast=autocast, clock=clock, rank=0, world_size=1, prompts_per_step=prompts_per_step,
            group_size=group_size, max_draws=1,
        )  # fmt: skip

    @staticmethod
    def check(
        *,
        has_reference: bool,
        world_size: int,
        path: str,
        num_pairs: int,
        prompts_per_step: int,
        group_size: int,
        **_: Any,
    ) -> None:
        """Raise `ConfigError` for a file that exists, no directory for it, or no pairs to be had."""
        if Path(path).exists() or not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"algo.path={path} must be a new file in a directory that exists")
        if num_pairs < 1 or group_size < 2:
            raise ConfigError(f"algo.num_pairs={num_pairs} must be at least 1, and group_size={group_size} at least 2")
        check_sizes(setting="prompts_per_step", per_step=prompts_per_step, at_least=1, world_size=1)
        if world_size > 1:
            raise ConfigError(f"pairs are written by one process, and there are {world_size}")

    def write(self, report: Callable[[int], None] = lambda _: None) -> dict[str, float]:
        """Sample, rank and write; `report` hears how many pairs there are. Returns what a person may want to know.

        Raises `RewardError` where next to no group has spread.
        """
        rows: list[dict] = []
        num_groups = step = 0
        while len(rows) < self.num_pairs:
            pairs, groups = self._pairs(step)
            rows, num_groups, step = rows + pairs, num_groups + groups, step + 1
            if num_groups >= MIN_GROUPS and len(rows) < MIN_PAIRS_PER_GROUP * num_groups:
                raise RewardError(f"only {len(rows)} of {num_groups} groups differ in their reward: nothing to rank")
            report(min(len(rows), self.num_pairs))
        rows = rows[: self.num_pairs]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, self.path)
        means = {name: sum(row[name] for row in rows) / len(rows) for name in ("score_chosen", "score_rejected")}
        return {"pairs": len(rows), "groups": num_groups, **means}

    def _pairs(self, step: int) -> tuple[list[dict], int]:
        sampled = self.rollouts(step)
        best, worst, is_pair = best_and_worst(sampled.scored.total, group_size=self.group_size)
        texts, rewards = self.tokenizer.decode_batch(sampled.rollout.completions()), sampled.scored.total.tolist()
        ends = [reason == "stop" for reason in sampled.rollout.finish_reasons]
        rows = [
            {
                "prompt": prompt.text,
                "chosen": texts[high],
                "rejected": texts[low],
                "chosen_ends": ends[high],
                "rejected_ends": ends[low],
                "score_chosen": rewards[high],
                "score_rejected": rewards[low],
            }
            for prompt, high, low, counts in zip(
                sampled.prompts, best.tolist(), worst.tolist(), is_pair.tolist(), strict=True
            )
            if counts and (texts[high], ends[high]) != (texts[low], ends[low])  # other ids may give the same text
        ]
        return rows, len(sampled.prompts)
