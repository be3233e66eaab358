"""Every online algorithm: prompts -> rollout -> rewards -> advantages -> loss, as a composition of small parts.

REINFORCE, RLOO, GRPO and Dr. GRPO are choices of an advantage, a surrogate, an aggregation and a KL penalty; each
choice is one callable from `rlft.functional` with its formula and paper in its docstring, and the YAML files under
conf/algo/ put them together. A part is called with those of the tensors below that its signature names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rlft.algos.base import Evaluation, Totals
from rlft.algos.evaluation import Evaluator
from rlft.algos.kl import KLPenalty
from rlft.algos.scoring import add_rewards, exact_token_kl, frozen_scores, sample_rows, score
from rlft.data.prompts import Prompt, PromptData
from rlft.errors import ConfigError, NonFiniteError
from rlft.models.base import CausalLM
from rlft.models.scorer import Scorer
from rlft.rewards.compose import RewardOutput, RewardSum
from rlft.rollout.engine import Rollout, generate
from rlft.rollout.sampling import Sampling
from rlft.text.tokenizer import Tokenizer
from rlft.trainer.batch import Batch
from rlft.trainer.metrics import Clock, Means

EXACT_KL_VOCABULARY = 16_384  # up to here the exact KL is logged beside its estimate: one more head product a token
MAX_LOGPROB_DIFFERENCE = 1e-3  # between sampler and trainer in float32, nats


class PolicyGradient:
    """A policy-gradient algorithm over sampled completions.

    Arguments (beside the run's objects, which rlft/build.py hands in):
        advantage: from rewards to advantages. A part that takes a `mask` gets token rewards [B, T] (the completion's
            reward at its last token) and gives [B, T]; any other gets completion rewards [B] and gives [B].
        surrogate: per-token loss and statistics. aggregation: from tokens to a scalar.
        kl: the penalty, and what is logged as `kl`.
        entropy_coef: entropy bonus, nats to loss units.
        prompts_per_step, group_size: over all ranks; samples per prompt.
        updates_per_batch: optimizer steps on one rollout (GRPO's mu); from the second on the ratio departs from 1.
        eval_prompts: held-out prompts of an evaluation, one completion each.
        micro_batch, micro_batch_tokens: what one forward of the reference may hold.
        samples_per_step: completions written to samples.jsonl each step.
        top_k, top_p, min_new_tokens: bend the sampled distribution away from the policy's; refused unless
            allow_bent_sampling is set, and then the ratio's denominator is the policy's own logprob.
    """

    objective = ("eval/reward", "max")

    def __init__(
        self,
        *,
        policy: CausalLM,
        reference: CausalLM | None,
        rewards: RewardSum,
        data: PromptData,
        tokenizer: Tokenizer,
        sampling: Sampling,
        seed: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        is_float32: bool,
        rank: int,
        world_size: int,
        clock: Clock,
        advantage: Callable[..., Tensor],
        surrogate: Callable[..., tuple[Tensor, dict[str, Tensor]]],
        aggregation: Callable[..., Tensor],
        kl: KLPenalty,
        entropy_coef: float,
        prompts_per_step: int,
        group_size: int,
        updates_per_batch: int,
        eval_prompts: int,
        micro_batch: int | None,
        micro_batch_tokens: int | None,
        samples_per_step: int,
        top_k: int = 0,
        top_p: float = 1.0,
        min_new_tokens: int = 0,
        allow_bent_sampling: bool = False,
    ) -> None:
        if kl.coef and reference is None:
            raise ConfigError("a KL penalty needs a reference: set reference=initial, or algo/kl=none")
        if prompts_per_step % world_size:
            raise ConfigError(f"prompts_per_step={prompts_per_step} must be a multiple of the {world_size} processes")
        if "group_size" in _parameters(advantage) and group_size < 2:
            raise ConfigError(
                f"group_size={group_size}: an advantage within the group needs at least 2 samples of a prompt; "
                f"algo=reinforce goes with one"
            )
        if updates_per_batch < 1:
            raise ConfigError(f"algo.updates_per_batch must be at least 1, got {updates_per_batch}")
        if updates_per_batch > 1 and "old_logprobs" not in _parameters(surrogate):
            raise ConfigError(
                f"algo.updates_per_batch={updates_per_batch} needs a surrogate with a ratio (algo/surrogate=clipped): "
                f"after the first update the score function is off policy"
            )
        self.sampling = Sampling(
            sampling.max_new_tokens, sampling.temperature, top_k=top_k, top_p=top_p, min_new_tokens=min_new_tokens
        )
        if not (self.sampling.is_plain or allow_bent_sampling):
            raise ConfigError(
                "top_k, top_p and min_new_tokens bend the sampled distribution, so that the policy gradient is biased; "
                "set algo.allow_bent_sampling=true if that is what you want"
            )
        _check_room(data, max_new_tokens=sampling.max_new_tokens, context_length=policy.context_length)
        self.policy, self.reference, self.rewards, self.data = policy, reference, rewards, data
        self.tokenizer, self.seed, self.device, self.autocast = tokenizer, seed, device, autocast
        self.is_float32, self.rank, self.world_size, self.clock = is_float32, rank, world_size, clock
        self.advantage, self.surrogate, self.aggregation, self.kl = advantage, surrogate, aggregation, kl
        self.entropy_coef, self.group_size, self.updates_per_batch = entropy_coef, group_size, updates_per_batch
        self.prompts_per_step, self.samples_per_step = prompts_per_step, samples_per_step
        self.limits = {"max_rows": micro_batch, "max_tokens": micro_batch_tokens}
        self.has_exact_kl = reference is not None and policy.vocab_size <= EXACT_KL_VOCABULARY
        self.evaluator = Evaluator(
            policy=policy, reference=reference, rewards=rewards, data=data, tokenizer=tokenizer,
            sampling=self.sampling, device=device, autocast=autocast, limits=self.limits,
            has_exact_kl=self.has_exact_kl, num_prompts=eval_prompts,
        )  # fmt: skip

    def collect(self, batch_index: int) -> Batch:
        """prompts -> rollout -> rewards -> advantages, for this rank's share of the prompts."""
        prompts = self._prompts(batch_index)
        with self.clock("rollout"):
            rollout = self._rollout(prompts, batch_index)
        prompt_of_row = [prompt for prompt in prompts for _ in range(self.group_size)]
        with self.clock("reward"):
            scored = score(self.rewards, self.tokenizer, prompt_of_row, rollout)
        with self.clock("reference"):
            values = self._frozen_values(rollout)
        rewards = scored.total.to(self.device)
        mask = rollout.rows.completion_mask
        if self.kl.is_in_reward:
            penalty = self.kl(values["old_logprobs"], values["ref_logprobs"])
            rewards = rewards - self.kl.coef * torch.where(mask, penalty, 0.0).sum(dim=1)
        values["advantages"] = self._advantages(rewards, mask)
        means = self._metrics(scored, rollout)
        return Batch(rollout.rows, values, means, self._samples(prompt_of_row, rollout, scored, values["advantages"]))

    def loss(self, scorer: Scorer, batch: Batch, totals: Totals, means: Means, *, update: int) -> Tensor:
        """Return aggregation(surrogate + kl_coef * kl - entropy_coef * entropy) over a micro-batch."""
        mask, values = batch.rows.completion_mask, batch.values
        scores = scorer(batch.rows, temperature=self.sampling.temperature, entropy_grad=self.entropy_coef != 0)
        logprobs = scores.logprobs
        old_logprobs, advantages = values["old_logprobs"], values["advantages"]
        per_token, statistics = _call(
            self.surrogate, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask
        )
        if self.reference is not None:
            kl = self.kl(logprobs, values["ref_logprobs"])
            means.add("kl", kl, mask)
            if self.kl.is_in_loss:
                per_token = per_token + self.kl.coef * kl
        if self.reference is not None and self.has_exact_kl:
            ref_hidden, temperature = values["ref_hidden"][mask], self.sampling.temperature
            exact = exact_token_kl(self.policy, self.reference, scores.hidden, ref_hidden, temperature=temperature)
            means.add("kl_exact", exact)
        if self.entropy_coef:
            per_token = per_token - self.entropy_coef * scores.entropy
        means.add("entropy", scores.entropy, mask)
        for name, statistic in statistics.items():
            means.add(f"{name}_mean" if name.startswith("clip_ratio/") else name, statistic, mask)
        if update == 0:
            self._check_sampler(logprobs, old_logprobs, mask, means)
        return _call(
            self.aggregation, x=per_token, mask=mask, num_tokens=totals.num_tokens, num_sequences=totals.num_sequences
        )

    def evaluate(self) -> Evaluation:
        return self.evaluator()

    def plan(self) -> list[tuple[str, str]]:
        samples, new = self.prompts_per_step * self.group_size, self.sampling.max_new_tokens
        return [
            ("samples per step", f"{self.prompts_per_step} prompts x {self.group_size} = {samples:,}"),
            ("new tokens per step", f"at most {samples:,} x {new} = {samples * new:,}"),
            ("optimizer steps per batch", f"{self.updates_per_batch}"),
            ("rewards", ", ".join(f"{weight:g} x {name}" for name, weight in self.rewards.weights.items())),
            (
                "KL penalty",
                f"{self.kl.coef:g} x {self.kl.estimator} in the {self.kl.where}" if self.kl.coef else "none",
            ),
            *((f"data: {name}", f"{count:,}") for name, count in self.data.counts.items()),
        ]

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    def _prompts(self, batch_index: int) -> list[Prompt]:
        prompts = self.data.batch(batch_index, size=self.prompts_per_step, seed=self.seed)
        share = self.prompts_per_step // self.world_size
        return prompts[self.rank * share : (self.rank + 1) * share]

    def _rollout(self, prompts: list[Prompt], batch_index: int) -> Rollout:
        with self.autocast():
            return generate(
                self.policy, [p.ids for p in prompts], group_size=self.group_size, sampling=self.sampling,
                eos_id=self.tokenizer.eos_id, seed=self.seed, step=batch_index,
                first_prompt=self.rank * len(prompts), device=self.device,
            )  # fmt: skip

    def _frozen_values(self, rollout: Rollout) -> dict[str, Tensor]:
        """Return old_logprobs [B, T] and, with a reference, ref_logprobs [B, T] and perhaps ref_hidden [B, T, C]."""
        values, batch = {"old_logprobs": rollout.logprobs}, Batch(rollout.rows)
        temperature = self.sampling.temperature
        if not self.sampling.is_plain:
            with self.autocast():
                values["old_logprobs"] = frozen_scores(self.policy, batch, temperature=temperature, **self.limits)[0]
        if self.reference is not None:
            with self.autocast():
                logprobs, hidden = frozen_scores(self.reference, batch, temperature=temperature, **self.limits)
            values["ref_logprobs"] = logprobs
            if self.has_exact_kl:
                values["ref_hidden"] = hidden
        return values

    def _advantages(self, rewards: Tensor, mask: Tensor) -> Tensor:
        """Return [B, T] advantages, 0 outside the mask and in rows that no reward counts."""
        if "mask" in _parameters(self.advantage):
            last = rewards.new_zeros(mask.shape)
            rows = torch.arange(len(mask), device=mask.device)
            last[rows, mask.sum(dim=1) - 1] = rewards.nan_to_num(0.0)
            advantages = _call(self.advantage, rewards=last, mask=mask)
        else:
            advantages = _call(self.advantage, rewards=rewards, group_size=self.group_size)[:, None]
        return torch.where(mask & ~rewards.isnan()[:, None], advantages, 0.0)

    def _check_sampler(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, means: Means) -> None:
        difference = (logprobs.detach() - old_logprobs).abs()
        means.add_max("sampling/sampling_logp_difference/max", difference, mask)
        largest = float(torch.where(mask, difference, 0.0).max())
        if self.is_float32 and largest > MAX_LOGPROB_DIFFERENCE:
            raise NonFiniteError(
                f"the sampler's logprobs differ from the trainer's by up to {largest:.1e} nats (allowed in float32: "
                f"{MAX_LOGPROB_DIFFERENCE:g}): the policy that sampled is not the one that is trained"
            )

    def _metrics(self, scored: RewardOutput, rollout: Rollout) -> Means:
        means, mask = Means(), rollout.rows.completion_mask
        add_rewards(means, scored)
        if self.group_size > 1:
            groups = scored.total.view(-1, self.group_size)
            counted = ~groups.isnan()
            centred = torch.where(counted, groups - groups.nanmean(dim=1, keepdim=True), 0.0)
            std = (centred.square().sum(dim=1) / (counted.sum(dim=1) - 1).clamp(min=1)).sqrt()
            means.add("reward_std", std)
            means.add("frac_reward_zero_std", std < 1e-8)
        lengths = mask.sum(dim=1)
        means.add("completions/mean_length", lengths)
        means.add_max("completions/max_length", lengths)
        means.add("completions/clipped_ratio", torch.tensor([r == "length" for r in rollout.finish_reasons]))
        return means

    def _samples(self, rows: list[Prompt], rollout: Rollout, scored: RewardOutput, advantages: Tensor) -> list[dict]:
        samples = sample_rows(self.tokenizer, rows, rollout, scored)[: self.samples_per_step]
        return [row | {"advantage": float(a)} for row, a in zip(samples, advantages[:, 0].tolist(), strict=False)]


def _check_room(data: PromptData, *, max_new_tokens: int, context_length: int) -> None:
    """Refuse prompts that leave no room for a whole completion, so that nothing is cut short silently."""
    prompts = [prompt for split in ("train", "validation") for prompt in data.prompts(split)]
    longest = max(prompts, key=lambda prompt: len(prompt.ids), default=None)
    if longest is not None and len(longest.ids) + max_new_tokens > context_length:
        raise ConfigError(
            f"{longest.where}: a prompt of {len(longest.ids)} tokens and max_new_tokens={max_new_tokens} do not fit "
            f"the model's context of {context_length}: lower max_new_tokens, or leave long prompts out by "
            f"data.max_prompt_tokens={max(1, context_length - max_new_tokens)} data.on_long=skip"
        )


def _parameters(part: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(part).parameters)


def _call(part: Callable[..., Any], **available: Any) -> Any:
    """Call a part with those of the available tensors that its signature names."""
    return part(**{name: value for name, value in available.items() if name in _parameters(part)})
