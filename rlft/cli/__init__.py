"""The command line: `rlft train`, `eval`, `sample`, `report`, `verify`, `export` and `rank`.

`python -m rlft …` is the same, and `python train.py …` is `rlft train …`. Each command is one file here with a function
`run(arguments) -> exit code`; the file is imported when its command is called, so that `rlft --help` is fast. A user's
mistake ends in one line on stderr and the exit code of its kind (the table is in README.md).
"""

from __future__ import annotations

import importlib
import os
import sys

from rlft.core.errors import ConfigError, RlftError, nearest
from rlft.cpu.memory import restart_with_huge_pages

COMMANDS = {  # name: what it does
    "train": "train a policy; with -m a sweep of runs",
    "eval": "evaluate policies on held-out prompts, side by side",
    "sample": "continue prompts, from the command line, a file or stdin",
    "report": "make a table of finished runs, with intervals over seeds, and plots",
    "verify": "check every online algorithm against exact answers",
    "export": "write a policy in Hugging Face format, in a chosen precision",
    "rank": "write pairs of a policy's samples, ranked by a reward, for algo=dpo",
}
_COMPUTES = ("train", "eval", "rank")  # commands with large tensors: the process is restarted with huge pages
EXIT_INTERRUPTED = 130
USAGE = """usage: rlft COMMAND …        (python -m rlft COMMAND … is the same)

{commands}

rlft COMMAND --help says more, with examples. The first one:
  rlft train algo=grpo reward=sentiment
Tab completion: eval "$(register-python-argcomplete rlft)\""""


def command(name: str | None = None) -> int:
    """Run this process's command line; `name` is the command if the command line does not hold it (train.py)."""
    arguments = sys.argv[1:] if name is None else [name, *sys.argv[1:]]
    if "_ARGCOMPLETE" in os.environ:
        from rlft.cli.completion import complete

        complete()
    if arguments and arguments[0] in _COMPUTES:
        restart_with_huge_pages()
    return main(arguments)


def main(arguments: list[str]) -> int:
    """Run a command line, such as ["train", "steps=2"], and return its exit code."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(USAGE.format(commands="\n".join(f"  {name:<8}{what}" for name, what in COMMANDS.items())))
        return 0
    try:
        if name == "--version":
            from importlib.metadata import version

            print(f"rlft {version('rlft')}")
            return 0
        if name not in COMMANDS:
            hint = nearest(name, COMMANDS)
            raise ConfigError(f"there is no command {name!r}{hint}; the commands are {', '.join(COMMANDS)}")
        return importlib.import_module(f"rlft.cli.{MODULES.get(name, name)}").run(arguments[1:])
    except RlftError as error:
        print(f"rlft: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("rlft: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


MODULES = {"eval": "evaluate"}  # command: its file, where the name is that of a Python function
