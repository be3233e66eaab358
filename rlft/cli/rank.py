"""rlft rank: write pairs of a policy's samples, ranked by a reward, for algo=dpo (settings: conf/rank_pairs.yaml).

rlft rank algo.path=pairs.jsonl model=tiny data=reviews reward=sentiment
rlft train algo=dpo data=preferences data.source.path=pairs.jsonl
"""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import DictConfig

from rlft.cli.hydra_main import compose_and_call


def run(arguments: list[str]) -> int:
    return compose_and_call(_job, config_name="rank_pairs", arguments=arguments)


def _job(config: DictConfig) -> None:
    from rlft.config import checked

    settings = checked(config)  # before anything heavy is imported
    from rlft.build import build

    pairs: Any = build(settings).algorithm  # conf/rank_pairs.yaml puts them in the algorithm's place
    is_seen = sys.stderr.isatty()
    found = pairs.write(lambda n: print(f"\r{n:,} pairs", end="", flush=True, file=sys.stderr) if is_seen else None)
    if is_seen:
        print(file=sys.stderr)
    print(f"rlft: {pairs.path}: " + ", ".join(f"{name} {value:,.6g}" for name, value in found.items()))
