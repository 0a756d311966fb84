"""Devices by name, checked before a model is loaded."""

from __future__ import annotations

import torch


def check(name: str | None) -> None:
    """Raise ValueError for a device that does not exist on this machine; None and ``"auto"`` always exist.

    Raises
    ------
    ValueError
        with the devices of this machine.
    """
    if name is None or name == "auto":
        return
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    known = ["cpu", "auto", *(["cuda"] if gpus else []), *gpus, *mps]
    if name not in known:
        raise ValueError(f"device={name!r} is not on this machine; give one of {', '.join(known)}")
