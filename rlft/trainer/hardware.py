"""Which device and precision a run uses, as one small object that makes the accelerator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch

from rlft.core.errors import ConfigError
from rlft.core.ranges import Range

if TYPE_CHECKING:
    from accelerate import Accelerator

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("no", "bf16")
Threads = Annotated[int, Range(1, 1024)]  # where so many cannot start, the process ends without a message


@dataclass(frozen=True)
class Hardware:
    """Device and precision.

    Arguments:
        device: auto (a GPU where there is one), cpu or cuda.
        mixed_precision: "no" (float32) or "bf16" (autocast over float32 weights).
        num_threads: CPU threads, or None for torch's choice.
        tf32: whether float32 matrix products on a GPU may use TF32.
    """

    device: str
    mixed_precision: str
    num_threads: Threads | None
    tf32: bool

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ConfigError(f"hardware.device={self.device} is not one of {', '.join(DEVICES)}")
        if self.mixed_precision not in PRECISIONS:
            raise ConfigError(f"hardware.mixed_precision={self.mixed_precision} is not one of {', '.join(PRECISIONS)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("hardware.device=cuda, but torch sees no GPU; use hardware=cpu")
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"hardware.num_threads must be at least 1, got {self.num_threads}")

    @property
    def torch_device(self) -> torch.device:
        """The device of a single process."""
        is_cpu = self.device == "cpu" or (self.device == "auto" and not torch.cuda.is_available())
        return torch.device("cpu" if is_cpu else "cuda")

    def accelerator(self) -> Accelerator:
        """Return the accelerator; sets torch's thread count and TF32 mode, which are process-wide."""
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        torch.backends.cudnn.allow_tf32 = self.tf32
        from accelerate import Accelerator  # here, since it takes a while to import

        return Accelerator(cpu=self.torch_device.type == "cpu", mixed_precision=self.mixed_precision)
