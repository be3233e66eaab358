"""python -m rlft …: the same as rlft …."""

import sys

from rlft.cli import command

if __name__ == "__main__":
    sys.exit(command())
