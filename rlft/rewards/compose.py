"""The weighted sum of rewards; the result of each reward is checked, and its time is limited.

The sum follows TRL's `GRPOTrainer` (None is not counted, as in `nansum`), with one difference: a completion that no
reward counts gets nan, not 0, so that it can be left out of training.
"""

from __future__ import annotations

import inspect
import math
import numbers
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlft.core.errors import ConfigError, DataError, RewardError, RlftError, nearest

OWN_KEYWORDS = ("prompts", "completions", "completion_ids")
MESSAGES = "prompt_messages"  # each prompt's conversation or None, for rewards that have a parameter of this name
LARGEST = float(torch.finfo(torch.float32).max)


@dataclass
class RewardOutput:
    """The rewards of B completions, on the CPU.

    total: `[B]` float32, the sum over i of weight_i * reward_i; nan for a completion that no reward counts.
    components: name -> `[B]` float32, each reward before its weight; nan where it returned None. For a token-level
        reward it is the sum over the completion.
    tokens: B lists with the weighted sum of the token-level rewards at each token, which is part of `total` as well;
        None if no reward is token-level.
    """

    total: torch.Tensor
    components: dict[str, torch.Tensor]
    tokens: list[list[float]] | None = None


class RewardSum:
    """`total = sum_i weight_i * reward_i` over the rewards that are not None, added in float64, kept in float32.

    A reward of weight 0 is computed and logged, but has no effect: a row that only such rewards count is nan (unless
    all weights are 0).
    """

    def __init__(
        self, rewards: Mapping[str, Callable[..., Any]], *, weights: Mapping[str, float], timeouts: Mapping[str, float]
    ) -> None:
        """Arguments, which all have the rewards' names as keys:

        rewards: callables with TRL's signature.
        weights: finite numbers.
        timeouts: seconds that one call (for all B completions) may take.

        Raises `ConfigError` for a missing or unknown name, and for a value that is not allowed.
        """
        if not rewards:
            raise ConfigError("no reward is given; name at least one, such as reward=sentiment")
        for name, reward in rewards.items():
            if not callable(reward):
                raise ConfigError(f"reward.{name} is a {type(reward).__name__}, which cannot be called")
        _check_names("weight", weights, rewards)
        _check_names("timeout", timeouts, rewards)
        for name, weight in weights.items():
            if not _is_number(weight) or not math.isfinite(weight):
                raise ConfigError(f"reward.{name}.weight={weight!r} must be a finite number")
        for name, seconds in timeouts.items():
            if not _is_number(seconds) or not 0 < seconds <= threading.TIMEOUT_MAX:
                raise ConfigError(
                    f"reward.{name}.timeout={seconds!r} must be a number of seconds above 0 "
                    f"(at most {threading.TIMEOUT_MAX:.0f}); for no limit in practice, give a day, 86400"
                )
        self.rewards = dict(rewards)
        self.weights = {name: float(weights[name]) for name in rewards}
        self.timeouts = {name: float(timeouts[name]) for name in rewards}
        self._read_messages = {name for name in rewards if MESSAGES in inspect.signature(rewards[name]).parameters}

    def __call__(
        self,
        *,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        columns: dict[str, list],
        messages: Sequence[Sequence[dict[str, str]] | None] | None = None,
    ) -> RewardOutput:
        """Score B completions.

        Arguments:
            prompts, completions: B strings each.
            completion_ids: B lists of token ids, a generated end token included.
            columns: the other columns of the data, B values each; every reward gets them as keywords.
            messages: the conversation that each prompt was rendered from, or None; for rewards that have a parameter
                `prompt_messages`.

        Raises `RewardError`, with the names of the reward and the row, if a reward raises an error, takes too long,
        returns a wrong number of values, or returns a value that is neither None nor a finite number. A `ConfigError`
        or `DataError` of a reward keeps its type. Raises `DataError` for a column with the name of a reward's own
        argument, and `ValueError` if the lengths of the arguments differ.
        """
        _check_lengths(completions, {"prompts": prompts, "completion_ids": completion_ids, **columns}, columns)
        rows, tokens = [], None
        for name, reward in self.rewards.items():
            arguments = {  # copies, so that a reward that changes its lists does not affect the next one
                "prompts": list(prompts),
                "completions": list(completions),
                "completion_ids": [list(ids) for ids in completion_ids],
                **{column: list(values) for column, values in columns.items()},
            }
            if name in self._read_messages:
                arguments[MESSAGES] = [None] * len(prompts) if messages is None else list(messages)
            returned = _call(name, reward, arguments, self.timeouts[name]) if completions else []
            if _is_token_level(returned):
                per_token = _checked_tokens(name, returned, completion_ids)
                returned = [math.fsum(values) for values in per_token]
                weight = self.weights[name]
                before = tokens or [[0.0] * len(ids) for ids in completion_ids]
                tokens = [
                    [x + weight * y for x, y in zip(*pair, strict=True)] for pair in zip(before, per_token, strict=True)
                ]
            rows.append(_checked(name, returned, completions))
        values = torch.tensor(rows, dtype=torch.float64)  # [R, B]
        weights = torch.tensor(list(self.weights.values()), dtype=torch.float64)[:, None]
        counted = ~values.isnan()
        total = torch.where(counted, weights * values, 0.0).sum(0)
        decides = (weights != 0) | (weights == 0).all()
        total[~(counted & decides).any(0)] = math.nan
        return RewardOutput(total.float(), dict(zip(self.rewards, values.float(), strict=True)), tokens)


def _call(name: str, reward: Callable[..., Any], arguments: dict[str, Any], seconds: float) -> Any:
    """Return `reward(**arguments)`; it runs in a daemon thread, because a call that hangs cannot be ended."""
    future: Future[Any] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def work() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # each thread has its own current device, 0 by default
            future.set_result(reward(**arguments))
        except BaseException as error:  # SystemExit too, because the caller waits for a result
            future.set_exception(error)

    threading.Thread(target=work, name=f"reward {name}", daemon=True).start()
    try:
        failure = future.exception(timeout=seconds)
    except TimeoutError:
        raise RewardError(
            f"reward {name!r} took longer than {seconds:g} s for {len(arguments['completions'])} completions. A Python "
            f"call cannot be killed, so it is left running in its thread until the process ends. Make it faster, or "
            f"raise reward.{name}.timeout (seconds a call)"
        ) from None
    if failure is None:
        return future.result()
    if isinstance(failure, RlftError):  # an error of the settings or the data keeps its exit code
        raise type(failure)(f"reward {name!r}: {failure}") from failure
    raise RewardError(f"reward {name!r} raised {type(failure).__name__}: {failure} {_place(failure, arguments)}") from (
        failure
    )


def _place(failure: BaseException, arguments: dict[str, Any]) -> str:
    """Return where in the reward `failure` was raised; if the call itself failed, return how rewards are called."""
    frames = traceback.extract_tb(failure.__traceback__)
    if len(frames) > 1:  # the first frame is `work` above
        return f"(in {frames[-1].filename}:{frames[-1].lineno})"
    return f"(it is called with the keywords {', '.join(arguments)}; a **kwargs takes those that it does not use)"


def _checked(name: str, returned: Any, completions: list[str]) -> list[float]:
    """Return the B values of reward `name` as floats, with nan for None."""
    if isinstance(returned, (torch.Tensor, np.ndarray)):
        returned = returned.tolist()
    if not isinstance(returned, (list, tuple)):
        raise RewardError(
            f"reward {name!r} returned a {type(returned).__name__}; it must return a list with one float or None for "
            f"each of the {len(completions)} completions"
        )
    if len(returned) != len(completions):
        raise RewardError(f"reward {name!r} returned {len(returned)} values for {len(completions)} completions")
    values = []
    for row, value in enumerate(returned):
        if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.ndim == 0):
            value = value.item()
        if value is None:
            values.append(math.nan)
        elif _is_real(value) and abs(value) <= LARGEST:  # false for nan
            values.append(float(value))
        else:
            raise RewardError(
                f"reward {name!r} gave row {row} {_short(value)}, which is not a finite float32 number; return None "
                f"for a completion that is not to be counted. The completion was {_short(completions[row])}"
            )
    return values


def _is_token_level(returned: Any) -> bool:
    """Return whether a reward returned a list for each completion, as a token-level reward does."""
    return isinstance(returned, (list, tuple)) and len(returned) > 0 and all(isinstance(x, list) for x in returned)


def _checked_tokens(name: str, returned: list[list[Any]], completion_ids: list[list[int]]) -> list[list[float]]:
    """Return the values of a token-level reward, one for each token of each completion."""
    if len(returned) != len(completion_ids):
        raise RewardError(f"reward {name!r} returned {len(returned)} lists for {len(completion_ids)} completions")
    for row, (values, ids) in enumerate(zip(returned, completion_ids, strict=True)):
        if len(values) != len(ids):
            raise RewardError(f"reward {name!r} gave row {row} {len(values)} values for its {len(ids)} tokens")
        for value in values:
            if not (_is_real(value) and abs(value) <= LARGEST):
                raise RewardError(f"reward {name!r} gave a token of row {row} {_short(value)}, not a finite number")
    return [[float(value) for value in values] for values in returned]


def _check_names(what: str, given: Mapping[str, Any], rewards: Mapping[str, Any]) -> None:
    for name in given:
        if name not in rewards:
            raise ConfigError(f"a {what} is given for {name!r}, which is no reward{nearest(name, rewards)}")
    for name in rewards:
        if name not in given:
            raise ConfigError(f"reward {name!r} has no {what}; set reward.{name}.{what}")


def _check_lengths(completions: list[str], lists: Mapping[str, list], columns: Iterable[str]) -> None:
    for column in columns:
        if column in (*OWN_KEYWORDS, MESSAGES):
            raise DataError(f"the data's column {column!r} has the name of a reward's own argument; rename the column")
    for key, values in lists.items():
        if len(values) != len(completions):
            raise ValueError(f"{key} has {len(values)} values for {len(completions)} completions")


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real)  # bool is allowed, as verifiers return it


def _is_number(value: Any) -> bool:
    return _is_real(value) and not isinstance(value, bool)


def _short(value: Any, width: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"
