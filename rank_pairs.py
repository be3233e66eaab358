"""Write pairs of a policy's samples, ranked by a reward, for algo=dpo and its like (settings: conf/rank_pairs.yaml).

python rank_pairs.py algo.path=pairs.jsonl model=tiny data=reviews reward=sentiment
python train.py algo=dpo data=preferences_jsonl data.source.path=pairs.jsonl
"""

from __future__ import annotations

import sys
from typing import Any

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="rank_pairs")
def main(config: DictConfig) -> None:
    from rlft.build import build
    from rlft.config import checked
    from rlft.errors import RlftError

    try:
        pairs: Any = build(checked(config)).algorithm  # built in an algorithm's place
        found = pairs.write(lambda number: print(f"\r{number:,} pairs", end="", flush=True, file=sys.stderr))
    except RlftError as error:
        print(f"rlft: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    print(file=sys.stderr)
    print(f"rlft: {pairs.path}: " + ", ".join(f"{name} {value:,.6g}" for name, value in found.items()))


if __name__ == "__main__":
    main()
