"""Pairs for offline training, ranked by a reward: a policy's samples, of which the best and the worst of a group."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlft.algos.base import Run, Setup
from rlft.algos.online.rollouts import Rollouts
from rlft.core.errors import ConfigError, RewardError
from rlft.data.kinds import Kind
from rlft.functional.preference import best_and_worst

MIN_PAIRS_PER_GROUP = 0.01  # with a smaller share of groups that differ, over MIN_GROUPS of them, it gives up
MIN_GROUPS = 500


class RankPairs:
    """Writes pairs in TRL's columns: prompt, chosen, rejected, and the rewards as score_chosen and score_rejected.

    chosen_ends and rejected_ends say whether the policy ended the text, for `rlft.data.preferences.PreferenceData`.

    Built by rlft/build.py in an algorithm's place, from the same settings; it trains nothing. A group is sampled for
    each training prompt, in the order of a run with the same seed. One without spread is passed over.

    Arguments:
        path: the JSON-lines file to write; it must not exist, and appears when it is whole.
        num_pairs: how many to write.
    """

    reads = (Kind.PROMPTS, Kind.CONTEXTS)
    uses_rewards = True

    def __init__(self, run: Run, *, path: str, num_pairs: int) -> None:
        self.path, self.num_pairs = Path(path), num_pairs
        self.rollouts = Rollouts(run, sampling=run.sampling)

    @staticmethod
    def uses_reference(**settings: Any) -> bool:
        return False

    @staticmethod
    def check(setup: Setup, **settings: Any) -> None:
        """Raise `ConfigError` for a file that exists, no directory for it, or no pairs to be had."""
        path, num_pairs, group_size = settings["path"], settings["num_pairs"], setup.settings.group_size
        if Path(path).exists() or not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"algo.path={path} must be a new file in a directory that exists")
        if num_pairs < 1 or group_size < 2:
            raise ConfigError(f"algo.num_pairs={num_pairs} must be at least 1, and group_size={group_size} at least 2")
        if setup.world_size > 1:
            raise ConfigError(f"pairs are written by one process, and there are {setup.world_size}")

    def write(self, report: Callable[[int], None] = lambda _: None) -> dict[str, float]:
        """Sample, rank and write; `report` is called with the number of pairs so far. Returns counts and mean rewards.

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
        samples = self.rollouts(step)
        best, worst, is_pair = best_and_worst(samples.total, group_size=samples.group_size)
        texts, rewards = samples.texts, samples.total.tolist()
        ends = [reason == "stop" for reason in samples.rollout.finish_reasons]
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
                samples.prompts, best.tolist(), worst.tolist(), is_pair.tolist(), strict=True
            )
            if counts and (texts[high], ends[high]) != (texts[low], ends[low])  # other ids may give the same text
        ]
        return rows, len(samples.prompts)
