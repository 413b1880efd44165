"""What experts are to run on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Setting(NamedTuple):
    """device: its type, `cpu` or `cuda`.  capability: of a CUDA card, (8, 0)."""

    device: str
    dtype: torch.dtype
    capability: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, tensor: Tensor) -> Setting:
        return cls.at(tensor.device, tensor.dtype)

    @classmethod
    def at(cls, device: torch.device, dtype: torch.dtype) -> Setting:
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        return cls(device.type, dtype, capability)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")
