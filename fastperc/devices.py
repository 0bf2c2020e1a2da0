"""Which device to run on."""

from __future__ import annotations

import torch

from fastperc.errors import InputError


def find_device(name: str | None) -> torch.device:
    """The device called ``name``, or the best there is when ``None``.

    Raises:
        InputError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):  # unknown, not compiled in, or not in this machine
        raise InputError(f"no device {name!r} here; use cpu" + ", or cuda" * torch.cuda.is_available()) from None
    return device
