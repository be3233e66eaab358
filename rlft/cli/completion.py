"""Tab completion of `rlft`, by argcomplete; the settings of train and rank are completed by Hydra."""

from __future__ import annotations

import argparse
import importlib

from rlft.core.paths import conf_directory

_CONFIGS = {"train": "train", "rank": "rank_pairs"}  # Hydra's commands: the file of conf/ that each composes


def complete() -> None:
    """Answer the shell and exit, if it asks for completions; else return."""
    import argcomplete

    from rlft.cli import COMMANDS, MODULES

    whole = argparse.ArgumentParser(prog="rlft")
    commands = whole.add_subparsers()
    for name in COMMANDS:
        if name in _CONFIGS:
            settings = commands.add_parser(name)
            action = settings.add_argument("settings", nargs="*")
            action.completer = _settings_of(name)  # type: ignore[attr-defined]
        else:
            parser = importlib.import_module(f"rlft.cli.{MODULES.get(name, name)}").parser()
            commands.add_parser(name, parents=[parser], add_help=False)
    argcomplete.autocomplete(whole)


def _settings_of(command: str):
    def completer(prefix: str, **_: object) -> list[str]:
        from hydra._internal.core_plugins.bash_completion import BashCompletion
        from hydra._internal.hydra import Hydra
        from hydra._internal.utils import create_config_search_path

        hydra = Hydra.create_main_hydra2("rlft", create_config_search_path(str(conf_directory())))
        return BashCompletion(hydra.config_loader)._query(config_name=_CONFIGS[command], line=prefix)

    return completer
