"""The processor that a device trains on: its CPU, or a GPU that CUDA knows."""

from __future__ import annotations

import os

import torch

from prfl.config import ConfigError

CPU = torch.device("cpu")


def measured(device: torch.device) -> bool:
    """Whether what was measured to be quicker is so here: on CPUs, where torch has MKL. On ARM nothing was measured."""
    able: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return able and device == CPU


def found(name: str) -> torch.device:
    """The device of this name, `cpu`, `cuda` or `cuda:N`. Raises ConfigError for one that is not there.

    With CUDA, torch is told to take deterministic kernels wherever it has them, for the rest of the process.
    """
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or (kind == "cpu" and number):
        raise ConfigError(f"device: no {name!r}; have cpu, cuda, cuda:N")
    if kind == "cpu":
        return CPU
    there = torch.cuda.device_count()
    if int(number or 0) >= there:
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        have = ", ".join(["cpu", *(f"cuda:{i}" for i in range(there))])
        raise ConfigError(f"device: no {name} here; have {have} (torch {torch.__version__} {built})")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's linear algebra starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    return torch.device("cuda", int(number or 0))
