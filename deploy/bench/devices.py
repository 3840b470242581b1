"""Where PyTorch computes in a benchmark."""

from __future__ import annotations

import torch

from ...models.errors import ConfigError


def chosen(name: str) -> torch.device:
    """Of `cpu` or `cuda`. Raises ConfigError: another name, or there is no such device."""
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device is cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("PyTorch finds no GPU here (torch.cuda.is_available() is false); use --device cpu")
    return torch.device(name)


def told(device: torch.device) -> str:
    """What results say of it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
