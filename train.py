"""One run, or a sweep of runs: python train.py algo=grpo reward=sentiment is `rlft train …`."""

import sys

from rlft.cli import command

if __name__ == "__main__":
    sys.exit(command("train"))
