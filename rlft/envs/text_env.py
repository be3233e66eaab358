"""A Gymnasium environment in which an action is a token and an episode is a completion.

Prompts, tokenizer, rewards and the end of an episode are those of a rollout (`rlft/rollout/engine.py`): a policy's
completion, replayed token by token, has the return that `RewardSum` gives it there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlft.core.errors import ConfigError, DataError, nearest
from rlft.core.rng import order
from rlft.data.prompts import Prompt, PromptData
from rlft.rewards.compose import RewardSum
from rlft.text.tokenizer import Tokenizer

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.error import ResetNeeded
except ImportError as missing:
    raise ConfigError("rlft.envs needs gymnasium: pip install 'rlft[envs]'") from missing

OPTIONS = ("prompt",)


class TextEnv(gymnasium.Env[dict[str, Any], np.int64]):
    """The agent continues a prompt one token at a time; the completion is rewarded at its end.

    Observation: `ids`, int64 [context_length], the prompt and the completion so far, padded by 0; `length`, the number
    of ids before the padding. (0 is also a token's id: only `length` says where the text ends.)
    Action: a token's id, in 0 .. `vocab_size` - 1.
    Reward: 0 until the end, then the weighted sum of the rewards (a token-level one is summed over the completion, as
    rewards see whole completions only); 0 if no reward counts the completion, and then `info["is_counted"]` is false.
    End: terminated by the end-of-text token; truncated after `max_new_tokens`, or when the context is full.
    Info: `prompt`, its text; at the end also `completion`, its text; `rewards`, by name, each before its weight and
    None if the reward returned None; `is_counted`.

    Episode n after `reset(seed=s)` has the n-th prompt of the shuffled epochs of seed s, as step n of a run with that
    seed and `prompts_per_step=1` has. The seed is 0 until one is given.

    Arguments:
        data: the prompts. tokenizer: the one that encoded them.
        rewards: called for one completion at a time.
        max_new_tokens: the largest number of tokens in a completion, its end token included.
        context_length: the largest number of tokens in prompt and completion together: the policy's positions.
        split: the split that prompts are taken from.
        vocab_size: the policy's, if it is larger than the tokenizer's; None: the tokenizer's.

    Raises `ConfigError` for sizes that are not allowed, `DataError` if there is no prompt, or if one fills the context.
    """

    def __init__(
        self,
        data: PromptData,
        *,
        tokenizer: Tokenizer,
        rewards: RewardSum,
        max_new_tokens: int,
        context_length: int,
        split: str = "train",
        vocab_size: int | None = None,
    ) -> None:
        vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if vocab_size < tokenizer.vocab_size:
            raise ConfigError(f"vocab_size={vocab_size} is less than the tokenizer's {tokenizer.vocab_size} tokens")
        self.prompts = data.prompts(split)
        if not self.prompts:
            raise DataError(f"the {split} split has no prompt to continue; give more data")
        for prompt in self.prompts:
            if len(prompt.ids) >= context_length:
                raise DataError(
                    f"{prompt.where}: a prompt of {len(prompt.ids)} tokens leaves no room in a context of "
                    f"{context_length}: raise context_length, or leave long prompts out by data.on_long=skip"
                )
        self.columns = list(dict.fromkeys(name for prompt in self.prompts for name in prompt.columns))
        self.tokenizer, self.rewards = tokenizer, rewards
        self.max_new_tokens, self.context_length, self.vocab_size = max_new_tokens, context_length, vocab_size
        self.action_space = spaces.Discrete(vocab_size)
        ids = spaces.Box(0, vocab_size - 1, (context_length,), np.int64)
        self.observation_space = spaces.Dict({"ids": ids, "length": spaces.Discrete(context_length, start=1)})
        self._seed, self._episode = 0, 0  # of the next episode
        self._prompt: Prompt | None = None  # None while no episode is under way
        self._completion: list[int] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode with the next prompt, or with number `options["prompt"]` of the split.

        A `seed` restarts the count of episodes, in which episodes with a given prompt count as well.
        Raises `ConfigError` for an unknown option or a number that no prompt has.
        """
        super().reset(seed=seed)
        if seed is not None:
            self._seed, self._episode = seed, 0
        index = int(order(len(self.prompts), seed=self._seed, start=self._episode, count=1)[0])
        self._prompt = self.prompts[self._chosen(options or {}, default=index)]
        self._completion = []
        self._episode += 1
        return self._observation(self._prompt), {"prompt": self._prompt.text}

    def step(self, action: int | np.integer) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Append a token; raises `ResetNeeded` if no episode is under way, `ValueError` if the action is no token."""
        prompt = self._prompt
        if prompt is None:
            raise ResetNeeded("no episode is under way: call reset() first, and again after each end")
        if not self.action_space.contains(action):
            raise ValueError(f"action={action!r} is not a token id, an integer in 0 .. {self.vocab_size - 1}")
        self._completion.append(int(action))
        room = min(self.max_new_tokens, self.context_length - len(prompt.ids))
        terminated = int(action) == self.tokenizer.eos_id
        truncated = not terminated and len(self._completion) == room
        reward, info = self._scored(prompt) if terminated or truncated else (0.0, {})
        if terminated or truncated:
            self._prompt = None
        return self._observation(prompt), reward, terminated, truncated, {"prompt": prompt.text} | info

    def _chosen(self, options: dict[str, Any], *, default: int) -> int:
        for name in options:
            if name not in OPTIONS:
                raise ConfigError(f"unknown option {name!r}{nearest(name, OPTIONS)}; allowed: {', '.join(OPTIONS)}")
        index = options.get("prompt", default)
        if not isinstance(index, int | np.integer) or not 0 <= index < len(self.prompts):
            raise ConfigError(f"options['prompt']={index!r} must be an integer in 0 .. {len(self.prompts) - 1}")
        return int(index)

    def _observation(self, prompt: Prompt) -> dict[str, Any]:
        written = prompt.ids + self._completion
        ids = np.zeros(self.context_length, dtype=np.int64)
        ids[: len(written)] = written
        return {"ids": ids, "length": np.int64(len(written))}

    def _scored(self, prompt: Prompt) -> tuple[float, dict[str, Any]]:
        """Return the reward of the finished completion, and its part of `info`."""
        completion = self.tokenizer.decode(self._completion)
        scored = self.rewards(
            prompts=[prompt.text],
            completions=[completion],
            completion_ids=[self._completion],
            columns={name: [prompt.columns.get(name)] for name in self.columns},
            messages=[prompt.messages],
        )
        total, is_counted = float(scored.total[0]), not bool(scored.total[0].isnan())
        values = {name: None if value[0].isnan() else float(value[0]) for name, value in scored.components.items()}
        return total if is_counted else 0.0, {"completion": completion, "rewards": values, "is_counted": is_counted}
