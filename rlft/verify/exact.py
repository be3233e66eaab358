"""Exact answers by listing every completion: objective, policy gradient, KL, optimum and the reward-KL frontier.

With a prompt drawn uniformly, completions y and a frozen reference,

    J(pi) = E[r] - beta KL(pi || ref),   pi*(y) = ref(y) exp(r(y) / beta) / Z,   J* = beta log Z,
    J(pi) = J* - beta KL(pi || pi*)

(Peters and Schaal, 2007; Levine, arXiv:1805.00909; Rafailov et al., arXiv:2305.18290, appendix A.1). Everything here is
in float64 and goes through plain forwards of whole sequences: no cache, no scorer, no sampler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlft.models.base import CausalLM
from rlft.verify.enumerable import Task


def logprobs(policy: CausalLM, task: Task, *, temperature: float = 1.0) -> Tensor:
    """Return log pi(completion | prompt), [P, N], differentiable in the policy."""
    ids = torch.tensor([[*c, *[0] * (task.length - len(c))] for c in task.completions])
    lengths = torch.tensor([len(c) for c in task.completions])
    counted = torch.arange(task.length) < lengths[:, None]
    rows = []
    for prompt in task.prompts:
        whole = torch.cat([torch.tensor(prompt).expand(len(ids), -1), ids], dim=1)
        hidden = policy(whole[:, :-1])[:, len(prompt) - 1 :]
        hidden = torch.where(counted[..., None], hidden, 0.0)  # what follows an end is no context
        logp = torch.log_softmax(hidden @ policy.head_weight.t() / temperature, dim=-1)
        tokens = logp.gather(-1, ids[..., None])[..., 0]
        rows.append(torch.where(counted, tokens, 0.0).sum(1))
    return torch.stack(rows)


@torch.no_grad()
def table(policy: CausalLM, task: Task, *, temperature: float = 1.0) -> Tensor:
    """Return log p(next token | context) for each of the task's contexts, [contexts, V]."""
    rows = []
    for context in task.contexts:
        hidden = policy(torch.tensor([context]))[0, -1]
        rows.append(torch.log_softmax(hidden @ policy.head_weight.t() / temperature, dim=-1))
    return torch.stack(rows)


def expected_reward(logp: Tensor, rewards: Tensor) -> Tensor:
    """Return E[r], the mean over prompts, from [P, N] and [P, N]."""
    return (logp.exp() * rewards).sum(1).mean()


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """Return KL(p || q) in nats a completion, the mean over prompts, from [P, N] each."""
    return (logp.exp() * (logp - logq)).sum(1).mean()


def objective(logp: Tensor, ref_logp: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    """Return J = E[r] - beta KL(pi || ref)."""
    return expected_reward(logp, rewards) - beta * kl(logp, ref_logp)


@dataclass(frozen=True)
class Optimum:
    """The best that any policy can do under a KL of strength beta."""

    logp: Tensor  # [P, N] log pi*
    objective: float  # J*
    reward: float  # E[r] under pi*
    kl: float  # KL(pi* || ref), nats a completion


def optimum(ref_logp: Tensor, rewards: Tensor, *, beta: float) -> Optimum:
    """Return pi* and J* in closed form."""
    tilted = ref_logp + rewards / beta
    log_z = tilted.logsumexp(1, keepdim=True)
    logp = tilted - log_z
    reward, divergence = expected_reward(logp, rewards), kl(logp, ref_logp)
    return Optimum(logp, float(beta * log_z.mean()), float(reward), float(divergence))


def frontier(ref_logp: Tensor, rewards: Tensor, *, max_kl: float, points: int = 60) -> list[tuple[float, float]]:
    """Return (KL, largest E[r] at that KL), by sweeping beta down until the KL passes `max_kl`.

    No policy is above it: pi*_beta maximises E[r] - beta KL, so it has the largest E[r] of all with its KL or less.
    """
    found = [(0.0, float(expected_reward(ref_logp, rewards)))]
    for beta in torch.logspace(1.5, -1.5, points).tolist():
        best = optimum(ref_logp, rewards, beta=beta)
        found.append((best.kl, best.reward))
        if best.kl > max_kl:
            break
    return found


def attainable(ref_logp: Tensor, rewards: Tensor, divergence: float) -> tuple[float, float]:
    """Return the largest E[r] of a policy whose KL to the reference is `divergence`, and the beta whose pi* has it.

    Found by bisection in log beta, which is also the frontier's slope there. At a KL of 0 beta is the largest that is
    tried; beyond the KL of the best completions nothing more can be won, and it is the smallest.
    """
    low, high = -4.0, 4.0  # of log10 beta: the KL falls as beta rises
    for _ in range(60):
        middle = (low + high) / 2
        is_far = optimum(ref_logp, rewards, beta=10**middle).kl > divergence
        low, high = (middle, high) if is_far else (low, middle)
    return optimum(ref_logp, rewards, beta=10**low).reward, 10**low
