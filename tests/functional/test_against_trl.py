"""Logprobs and entropies against TRL's helpers (`trl.trainer.utils`), if TRL is installed (--no-deps is enough)."""

from __future__ import annotations

import pytest
import torch

from rlft.functional.logprobs import token_logprobs

trl = pytest.importorskip("trl.trainer.utils", reason="pip install --no-deps trl==1.16.0")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_chunked_head_gives_trls_logprobs_and_entropies(temperature):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(101, 8, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 101, (37,), generator=generator)
    logprobs, entropy = token_logprobs(hidden, weight, ids, temperature=temperature)
    logits = hidden @ weight.T / temperature
    # float64: a few roundings of sums over 101 terms
    torch.testing.assert_close(logprobs, trl.selective_log_softmax(logits, ids), atol=1e-12, rtol=0.0)
    torch.testing.assert_close(entropy, trl.entropy_from_logits(logits), atol=1e-12, rtol=0.0)
    assert float(logprobs.std()) > 0.5
