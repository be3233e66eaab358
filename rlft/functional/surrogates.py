"""Surrogate losses: per-token losses [B, T] whose gradient is the policy gradient, and statistics of the clipping.

In the formulas, r = exp(logprob - old_logprob) is the ratio of the current policy to the one that sampled. Each
function returns the loss of every position, which `rlft.functional.aggregation` masks and averages, and a dict of
detached [B, T] statistics under TRL's names, which the caller masks and averages too. The mean of an indicator
(`clip_ratio/low`, `clip_ratio/high`, and `clip_ratio/region` for either) is a fraction of tokens.

Gradients flow only into `logprobs` (or `values`); everything else is detached. `advantages` are [B, T], or [B] or
[B, 1] for one advantage per completion. Where an input is not finite, or the ratio overflows, the loss is nan and the
gradient 0: a masked position then has no effect, and one that counts is noticed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.functional.masking import as_bool, require_same_shape, zero_outside

Surrogate = tuple[Tensor, dict[str, Tensor]]


def score_function(logprobs: Tensor, advantages: Tensor) -> Surrogate:
    """Return REINFORCE's loss (Williams 1992; RLOO, arXiv:2402.14740), which is on-policy and has no ratio.

        loss_t = -A_t logprob_t

    Args:
        logprobs: [B, T] floating, of the current policy.
        advantages: [B, T], [B, 1] or [B].

    Returns:
        loss [B, T], and no statistics.
    """
    advantages = _per_token(advantages, logprobs)
    sound = logprobs.isfinite() & advantages.isfinite()
    loss = -torch.where(sound, advantages, 0.0) * torch.where(sound, logprobs, 0.0)
    return torch.where(sound, loss, torch.nan), {}


def clipped(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Surrogate:
    """Return PPO's clipped loss (arXiv:1707.06347, eq. 7), with separate bounds (DAPO, arXiv:2503.14476) and dual clip.

        loss_t = -min(r A, clamp(r, 1 - clip_low, 1 + clip_high) A)
        dual clip, where A < 0:  loss_t = -max(min(...), dual_clip A)      (arXiv:1912.09729, eq. 5)

    Args:
        logprobs: [B, T] floating, of the current policy.
        old_logprobs: [B, T], of the policy that sampled.
        advantages: [B, T], [B, 1] or [B].
        clip_low: in [0, 1].
        clip_high: at least 0; DAPO takes 0.28 with a clip_low of 0.2.
        dual_clip: the largest ratio by which a negative advantage is multiplied, above 1; None: no bound.

    Returns:
        loss [B, T], and `ratio`, `clip_ratio/low` (r below the bound and A < 0), `clip_ratio/high` (above, A > 0),
        `clip_ratio/region`, and with a dual clip `clip_ratio/dual` (r above it and A < 0).

    Raises:
        ValueError: for a bound outside its range.
    """
    _check_clip(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip must be greater than 1 (3.0 in its paper), or None for none, got {dual_clip}")
    advantages = _per_token(advantages, logprobs)
    log_ratio, sound = _log_ratio(logprobs, old_logprobs, advantages)
    advantages, ratio = torch.where(sound, advantages, 0.0), log_ratio.exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)
    statistics = _clip_statistics(ratio, advantages, sound, clip_low, clip_high)
    if dual_clip is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
        statistics["clip_ratio/dual"] = _indicator((ratio > dual_clip) & (advantages < 0), ratio)
    return torch.where(sound, -gain, torch.nan), statistics


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_high: float,
    clip_low: float | None = None,
) -> Surrogate:
    """Return CISPO's loss (MiniMax-M1, arXiv:2506.13585, eq. 4): it clips the weight and keeps every token's gradient.

        loss_t = -stopgrad(clamp(r, clip_low, clip_high)) A_t logprob_t

    Args:
        logprobs: [B, T] floating, of the current policy.
        old_logprobs: [B, T], of the policy that sampled.
        advantages: [B, T], [B, 1] or [B].
        clip_high: upper bound of r itself, not of its distance from 1 (the paper's 1 + eps_high); greater than 0.
        clip_low: lower bound of r itself, in [0, clip_high]; None: no bound, as in the paper's experiments.

    Returns:
        loss [B, T], and `ratio`, `clip_ratio/low`, `clip_ratio/high` (where r is beyond the bound, whatever the sign of
        A), `clip_ratio/region`.

    Raises:
        ValueError: for a bound outside its range.
    """
    if not clip_high > 0.0:
        raise ValueError(f"clip_high is CISPO's bound on the ratio itself and must be greater than 0, got {clip_high}")
    if clip_low is not None and not 0.0 <= clip_low <= clip_high:
        raise ValueError(
            f"clip_low is CISPO's lower bound on the ratio itself and must be between 0 and clip_high = {clip_high}, "
            f"or None for none, got {clip_low}"
        )
    advantages = _per_token(advantages, logprobs)
    log_ratio, sound = _log_ratio(logprobs, old_logprobs, advantages)
    ratio = log_ratio.detach().exp()
    weight = torch.where(sound, advantages, 0.0) * ratio.clamp(clip_low, clip_high)
    loss = -weight * torch.where(sound, logprobs, 0.0)
    low = ratio < clip_low if clip_low is not None else torch.zeros_like(sound)
    high = ratio > clip_high
    return torch.where(sound, loss, torch.nan), _statistics(ratio, sound, low, high)


def sequence_ratio(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """Return GSPO's loss (arXiv:2507.18071, eq. 5), with one ratio per sequence, the geometric mean over its tokens.

        s = exp(sum_t m_t (logprob_t - old_logprob_t) / max(1, sum_t m_t))
        loss_t = -min(s A_t, clamp(s, 1 - clip_low, 1 + clip_high) A_t)      at every token of the sequence

    With one advantage per completion, `sequence_mean` of this loss is the paper's objective.

    Args:
        logprobs: [B, T] floating, of the current policy.
        old_logprobs: [B, T], of the policy that sampled.
        advantages: [B, T], [B, 1] or [B].
        mask: [B, T] bool or float; tokens outside it do not enter s.
        clip_low, clip_high: distances from 1; the paper uses 3e-4 and 4e-4, because s varies far less than r.

    Returns:
        loss [B, T], 0 outside the mask, and `ratio` (s at every token), `clip_ratio/low`, `clip_ratio/high`,
        `clip_ratio/region`.

    Raises:
        ValueError: for a bound outside its range.
    """
    _check_clip(clip_low, clip_high)
    counted = as_bool(mask, logprobs)
    advantages = zero_outside(_per_token(advantages, logprobs), counted)
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    log_ratio = zero_outside(logprobs - old_logprobs.detach(), counted)
    log_sequence_ratio = log_ratio.sum(-1, keepdim=True) / counted.sum(-1, keepdim=True).clamp(min=1)
    ratio = log_sequence_ratio.exp().expand_as(logprobs)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)
    return zero_outside(-gain, counted), _clip_statistics(ratio, advantages, counted, clip_low, clip_high)


def sapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> Surrogate:
    """Return SAPO's loss (arXiv:2511.20347, eq. 5 and 6): a soft gate in place of the clip.

        loss_t = -(4 / tau) sigmoid(tau (r - 1)) A_t,   tau = tau_pos where A > 0, else tau_neg

    At r = 1 the gradient is the policy gradient; away from r = 1 the gate closes smoothly.

    Args:
        logprobs: [B, T] floating, of the current policy.
        old_logprobs: [B, T], of the policy that sampled.
        advantages: [B, T], [B, 1] or [B].
        tau_pos, tau_neg: how fast the gate closes; greater than 0, and in the paper larger for negative advantages.

    Returns:
        loss [B, T], and `ratio`.

    Raises:
        ValueError: for a tau that is not positive.
    """
    if not (tau_pos > 0.0 and tau_neg > 0.0):
        raise ValueError(f"tau_pos and tau_neg must be greater than 0, got {tau_pos} and {tau_neg}")
    advantages = _per_token(advantages, logprobs)
    log_ratio, sound = _log_ratio(logprobs, old_logprobs, advantages)
    advantages, ratio = torch.where(sound, advantages, 0.0), log_ratio.exp()
    # `where` of two Python numbers would be float32; full_like keeps the dtype.
    tau = torch.where(advantages > 0, torch.full_like(ratio, tau_pos), tau_neg)
    gain = torch.sigmoid(tau * (ratio - 1.0)) * (4.0 / tau) * advantages
    return torch.where(sound, -gain, torch.nan), {"ratio": torch.where(sound, ratio.detach(), torch.nan)}


def value_clipped(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Surrogate:
    """Return PPO's value loss: the larger of the plain and the clipped squared error, times 1/2.

        loss_t = max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / 2

    It is from OpenAI's baselines (ppo2), not from the PPO paper; TRL's PPO has the same loss, including the 1/2.

    Args:
        values: [B, T] floating, of the current critic.
        old_values: [B, T], of the critic at sampling time.
        returns: [B, T], the targets (`gae`'s second result).
        clip: how far a value may move, in units of the reward; greater than 0, inf for no clipping.

    Returns:
        loss [B, T], and `val/clipfrac` (1 where the clipped error is the larger).

    Raises:
        ValueError: for a clip that is not positive.
    """
    if not clip > 0.0:
        raise ValueError(f"clip must be greater than 0 (0.2 in PPO, inf for no clipping), got {clip}")
    require_same_shape(values=values, old_values=old_values, returns=returns)
    sound = values.isfinite() & old_values.isfinite() & returns.isfinite()
    values, old, target = (torch.where(sound, x, 0.0) for x in (values, old_values.detach(), returns.detach()))
    plain = (values - target).square()
    bounded = (values.clamp(old - clip, old + clip) - target).square()
    statistics = {"val/clipfrac": _indicator(bounded > plain, values)}
    return torch.where(sound, 0.5 * torch.maximum(plain, bounded), torch.nan), statistics


def _per_token(advantages: Tensor, logprobs: Tensor) -> Tensor:
    """Return detached advantages [B, T] from [B, T], [B, 1] or [B]."""
    shaped = advantages.detach()[:, None] if advantages.dim() == 1 else advantages.detach()
    if logprobs.dim() != 2 or shaped.shape not in (logprobs.shape, (logprobs.shape[0], 1)):
        raise ValueError(
            f"logprobs must be [B, T] and advantages [B, T], [B, 1] or [B], got {list(logprobs.shape)} and "
            f"{list(advantages.shape)}"
        )
    return shaped.expand_as(logprobs)


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Return log r, 0 where an input or r is not finite (a nan would reach the gradient), and a mask of the finite."""
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    log_ratio = logprobs - old_logprobs.detach()
    sound = log_ratio.isfinite() & log_ratio.detach().exp().isfinite() & advantages.isfinite()
    return torch.where(sound, log_ratio, 0.0), sound


def _clip_statistics(
    ratio: Tensor, advantages: Tensor, sound: Tensor, clip_low: float, clip_high: float
) -> dict[str, Tensor]:
    """Return the statistics of a clipped ratio; only clipping that removes the gradient is counted."""
    low = (ratio < 1.0 - clip_low) & (advantages < 0)
    high = (ratio > 1.0 + clip_high) & (advantages > 0)
    return _statistics(ratio, sound, low, high)


def _statistics(ratio: Tensor, sound: Tensor, low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """Return detached [B, T] statistics; the ratio is nan where `sound` is false."""
    return {
        "ratio": torch.where(sound, ratio.detach(), torch.nan),
        "clip_ratio/low": _indicator(low, ratio),
        "clip_ratio/high": _indicator(high, ratio),
        "clip_ratio/region": _indicator(low | high, ratio),
    }


def _indicator(condition: Tensor, like: Tensor) -> Tensor:
    """Return 1 where the condition is true and 0 elsewhere, in `like`'s dtype."""
    return condition.to(like.dtype)


def _check_clip(clip_low: float, clip_high: float) -> None:
    """Raise `ValueError` for clip distances outside their ranges."""
    if not 0.0 <= clip_low <= 1.0:
        raise ValueError(f"clip_low must be between 0 and 1, the ratio is bounded by 1 - clip_low, got {clip_low}")
    if not clip_high >= 0.0:
        raise ValueError(f"clip_high must be at least 0, the ratio is bounded by 1 + clip_high, got {clip_high}")
