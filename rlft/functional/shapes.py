"""Types of tensors by their shape; an algorithm's parts declare with them what they take and return."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

PerCompletion = Annotated[Tensor, "[B]"]  # one entry for each completion
PerToken = Annotated[Tensor, "[B, T]"]  # one for each token of each completion
