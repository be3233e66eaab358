"""Exact answers by listing every completion: objective, policy gradient, KL, optimum and the reward-KL frontier.

With a prompt drawn uniformly, completions y and a frozen reference,

    J(pi) = E[r] - beta KL(pi || ref),   pi*(y) = ref(y) exp(r(y) / beta) / Z,   J* = beta log Z,
    J(pi) = J* - beta KL(pi || pi*)

(Peters and Schaal, 2007; Levine, arXiv:1805.00909; Rafailov et al., arXiv:2305.18290, appendix A.1). Everything here is
in float64 and from plain forward passes of whole sequences: no cache, no scorer, no sampler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlft.models.base import CausalLM
from rlft.verify.enumerable import Task
from rlft.verify.policy import TabularPolicy


def logprobs(policy: CausalLM, task: Task, *, temperature: float = 1.0) -> Tensor:
    """Return log pi(completion | prompt), [P, N], differentiable in the policy."""
    ids = torch.tensor([[*c, *[0] * (task.length - len(c))] for c in task.completions])
    lengths = torch.tensor([len(c) for c in task.completions])
    counted = torch.arange(task.length) < lengths[:, None]
    rows = []
    for prompt in task.prompts:
        whole = torch.cat([torch.tensor(prompt).expand(len(ids), -1), ids], dim=1)
        hidden = policy(whole[:, :-1])[:, len(prompt) - 1 :]
        hidden = torch.where(counted[..., None], hidden, 0.0)  # what follows an end token is not scored
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


def gradient(value: Tensor, policy: CausalLM) -> Tensor:
    """Return the gradient of a scalar by every weight of the policy, flat."""
    gradients = torch.autograd.grad(value, list(policy.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in gradients])


@dataclass(frozen=True)
class Optimum:
    """The policy that maximises E[r] - beta KL, and its values."""

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


def regret(logp: Tensor, ref_logp: Tensor, rewards: Tensor, *, beta: float) -> float:
    """Return J* - J, by how much a policy misses the optimum."""
    best = optimum(ref_logp, rewards, beta=beta).objective
    return best - float(objective(logp, ref_logp, rewards, beta=beta))


def token_kls(policy: TabularPolicy, reference: TabularPolicy, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return KL(pi || ref) and KL(ref || pi) of the next token at each context, [contexts]."""
    logp, logq = (torch.log_softmax(p.table / temperature, -1) for p in (policy, reference))
    logq = logq.detach()
    return (logp.exp() * (logp - logq)).sum(-1), (logq.exp() * (logq - logp)).sum(-1)


def visits(task: Task, chance: Tensor) -> Tensor:
    """Return how often a policy comes to each context, [contexts], from its completions' chances [N] (one prompt)."""
    rows = [task.places[task.prompts[0] + ids[:t]] for ids in task.completions for t in range(len(ids))]
    each = chance.repeat_interleave(torch.tensor([len(ids) for ids in task.completions]))
    return torch.zeros(len(task.contexts), dtype=chance.dtype).index_add(0, torch.tensor(rows), each)


def frontier(ref_logp: Tensor, rewards: Tensor, *, max_kl: float, points: int = 60) -> list[tuple[float, float]]:
    """Return points (KL, largest E[r] at that KL), for smaller and smaller beta until the KL passes `max_kl`.

    No policy is above it: pi*_beta maximises E[r] - beta KL, so no policy with its KL or less has a larger E[r].
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

    Beta, which is also the frontier's slope there, is found by bisection of its logarithm between -4 and 4 (base 10).
    It ends at the largest for a KL of 0, and at the smallest beyond the KL of the best completions.
    """
    low, high = -4.0, 4.0  # of log10 beta: the KL falls as beta rises
    for _ in range(60):
        middle = (low + high) / 2
        is_far = optimum(ref_logp, rewards, beta=10**middle).kl > divergence
        low, high = (middle, high) if is_far else (low, middle)
    return optimum(ref_logp, rewards, beta=10**low).reward, 10**low
