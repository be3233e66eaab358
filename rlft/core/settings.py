"""The root settings of a run, and groups of settings that a constructor takes as one object.

A new root setting is one line in `conf/train.yaml`, with its default and meaning, and one field here, with its type and
range. Every object that has the `Run` can read it.
"""

from __future__ import annotations

import inspect
import typing
from dataclasses import dataclass
from typing import Annotated, Any

from rlft.core.errors import ConfigError
from rlft.core.ranges import Choice, Count, CountOrZero, NonNegative, Positive, Size

SCHEDULES = ("constant", "linear", "cosine")  # of the learning rate


@dataclass(frozen=True)
class RootSettings:
    """The root settings; `conf/train.yaml` holds their meanings and defaults."""

    name: str
    seed: CountOrZero
    run_dir: str | None
    resume: bool
    dry_run: bool
    trusted_modules: tuple[str, ...]
    steps: CountOrZero
    max_minutes: Positive | None
    max_tokens: Count | None
    patience: Count | None
    prompts_per_step: Size
    group_size: Size
    micro_batch: Size | None
    micro_batch_tokens: Size | None
    rollout_rows: Size | None
    max_new_tokens: Size
    temperature: Positive
    learning_rate: Positive
    warmup_steps: CountOrZero
    schedule: Annotated[str, Choice(SCHEDULES)]
    final_learning_rate_fraction: NonNegative
    max_grad_norm: Positive
    weight_decay: NonNegative
    betas: tuple[float, float]
    eval_every: CountOrZero
    eval_prompts: Size
    save_every: CountOrZero
    keep: Count
    log_every: Count
    profile: bool

    @property
    def limits(self) -> dict[str, int | None]:
        """The limits of one forward pass: the arguments of `Batch.micro_batches`."""
        return {"max_rows": self.micro_batch, "max_tokens": self.micro_batch_tokens}

    def check_without_evaluation(self) -> None:
        """Raise `ConfigError` for a setting that needs evaluations; for runs whose data has no validation split."""
        asked = {"patience": self.patience is not None, "eval_every": self.eval_every > 0, "steps": self.steps == 0}
        for name, is_asked in asked.items():
            if is_asked:
                raise ConfigError(
                    f"{name}={getattr(self, name)} asks for an evaluation, and the data holds nothing out for one: "
                    f"give it a validation split, by data.source.validation or as one of the splits of data.source.path"
                )


class SettingsGroup:
    """Base of dataclasses of settings that belong together.

    A constructor takes such a group as one argument. In YAML, its fields are written next to the constructor's other
    arguments, not in a node of their own: `algo.epochs`, although it is a field of `Updates`. Groups may be nested.
    """


def parameters_of(target: Any) -> dict[str, tuple[inspect.Parameter, Any]]:
    """Return the parameters and type hints, by name, that YAML can set; a group is replaced by its fields."""
    found: dict[str, tuple[inspect.Parameter, Any]] = {}
    hints = _hints(target)
    for name, parameter in inspect.signature(target).parameters.items():
        hint = hints.get(name)
        new = parameters_of(hint) if _is_group(hint) else {name: (parameter, hint)}
        assert not new.keys() & found.keys(), f"two groups of {target} have the field {new.keys() & found.keys()}"
        found |= new
    return found


def gathered(target: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Return `values`, whose names are those of `parameters_of`, with the values of each group made into its object."""
    made = dict(values)
    for name, hint in _hints(target).items():
        if _is_group(hint):
            own = {key: made.pop(key) for key in parameters_of(hint) if key in made}
            made[name] = hint(**gathered(hint, own))
    return made


def _is_group(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, SettingsGroup)


def _hints(target: Any) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError:  # annotations that exist for the type checker only
        return {}
