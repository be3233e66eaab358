"""Types that say what a tensor has an entry for; an algorithm's part says by them what it takes and gives."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

PerCompletion = Annotated[Tensor, "[B]"]  # one entry for each completion
PerToken = Annotated[Tensor, "[B, T]"]  # one for each token of each completion
