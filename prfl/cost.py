"""What a model costs as masked: FLOPs, memory, bytes."""

from __future__ import annotations

from math import prod

from prfl import widths
from prfl.masks import DENSE, Mask, prunable
from prfl.types import Architecture, Shortage, Task, Tree, Work

TRAINING = 3.0
"""FLOPs of a training step over those of its forward pass, *ours*: backward is two products of the forward's size.

Slightly high for the first layer, whose input needs no gradient.
"""

MAPS = 2.0
"""Activation values kept for the backward pass per output value of a layer, *ours*: before and after its nonlinearity.

The model zoo keeps 1.6 to 2.9 (pools and BatchNorm add to it).
"""

FRAMEWORK = 4.0e8
"""Resident bytes of a process that has imported `clients.app`, before any task, *measured*.

566 MB with torch 2.15 on x86-64 Linux, less the 165 MB that its libraries for GPUs take of it.
"""

KERNELS = 2.0e7
"""Bytes of code and tables that the first training step brings in, *measured* there: 15 to 20 MB."""

SLACK = 1.7
"""Growth of a process at the peak of a task over the values that `footprint` counts, *measured*: 1.4 to 1.7.

Allocators keep holes between tasks (glibc), and kernels reorder weights and pad activations (oneDNN).
"""


def flops(params: Tree, mask: Mask, architecture: Architecture, *, sparse: bool = False) -> float:
    """Forward FLOPs per sample, two a multiply-add, of convolutions and linear layers; training takes `TRAINING` times.

    Channel masks shrink it. Masks of single weights do not, unless the device has `sparse` kernels.
    `params` gives the full shapes. ValueError: a weight without a cost.
    """
    return sum(flops_by_kind(params, mask, architecture, sparse=sparse).values())


def flops_by_kind(params: Tree, mask: Mask, architecture: Architecture, *, sparse: bool = False) -> dict[str, float]:
    """`flops` of convolutions ("conv") and of linear layers ("linear") apart."""
    out = {"conv": 0.0, "linear": 0.0}
    for k, v in params.items():
        if prunable(v):
            kept = mask.count(k, v.shape) if sparse else prod(mask.shape(k, v.shape))
            out["conv" if v.dim() > 2 else "linear"] += 2.0 * _macs(architecture, k) * kept
    return out


def step(task: Task, architecture: Architecture, *, sparse: bool = False) -> dict[str, float]:
    """`flops_by_kind` of what a training step runs on a sample; with ordered dropout on average over its widths."""
    own, work = flops_by_kind(task.params, task.mask, architecture, sparse=sparse), task.work
    if not work.rungs:
        return own
    ladder = widths.ladder(task.density, work.rungs)
    narrow = [widths.leading(task.mask, width, task.density) for width in ladder[:-1]]
    inside = [flops_by_kind(task.params, mask, architecture, sparse=sparse) for mask in narrow]
    alone = len(ladder) if work.distil else 1  # with distillation the client's own width is run in every step
    return {kind: (alone * flops + sum(few[kind] for few in inside)) / len(ladder) for kind, flops in own.items()}


def memory(
    params: Tree, mask: Mask, architecture: Architecture, batch: int, *, momentum: bool = False, maps: float = MAPS
) -> float:
    """Bytes at the peak of training the physically small model on batches of `batch` samples, estimated.

    Values, gradients and (with `momentum`) velocities, plus `maps` times the outputs of all layers for the whole batch.
    Masks of single weights save nothing. Left out: the batch itself, the received values, the framework.
    """
    if batch < 1:
        raise ValueError(f"memory: batch must be 1 or more, got {batch}")
    held = sum(prod(mask.shape(k, v.shape)) * v.element_size() for k, v in params.items())
    outputs = sum(
        _macs(architecture, k) * mask.shape(k, v.shape)[0] * v.element_size() for k, v in params.items() if prunable(v)
    )
    return (3.0 if momentum else 2.0) * held + maps * batch * outputs


def footprint(params: Tree, mask: Mask, architecture: Architecture, work: Work, *, lossy: bool = False) -> float:
    """Bytes by which a device's process grows with a task, at the peak: what was received, and training.

    The message, the full tree that it is laid out in, the places of its values and a copy of them, `memory`, and what
    `work` adds; `SLACK` times that. lossy: what rounding withholds is carried along. Masks of single weights save
    nothing of the training, and cost a mask of floats.
    """
    trained = DENSE if work.scope == "all" and work.report.startswith("gradient") else mask
    small = sum(prod(trained.shape(k, v.shape)) * v.element_size() for k, v in params.items())
    total = memory(params, trained, architecture, work.batch, momentum=bool(work.momentum))
    total += small * (2 * bool(work.proximal) + work.report.startswith("gradient"))
    total += 2 * lossy * dense_bytes(params)
    for k, v in params.items():
        kept = mask.count(k, v.shape)
        total += v.element_size() * (v.numel() + kept)
        if not mask.whole(k):
            total += _PLACE * kept + v.element_size() * prod(trained.shape(k, v.shape))
        if k in mask.bits:
            total += (2 * v.element_size() + 1) * v.numel()
    return KERNELS + SLACK * total


def refusal(needed: float, available: float) -> str:
    """Why a device that has so many bytes does not take a task that needs so many; "" when it does."""
    return "" if needed <= available else str(Shortage(needed, available))


def priced(params: Tree, architecture: Architecture) -> bool:
    """Whether every weight has its multiply-adds."""
    return all(k in architecture.macs for k, v in params.items() if prunable(v))


def dense_bytes(params: Tree) -> int:
    """Bytes of all values of the full model."""
    return sum(v.numel() * v.element_size() for v in params.values())


_PLACE = 8  # bytes of a position, int64


def _macs(architecture: Architecture, entry: str) -> float:
    if entry not in architecture.macs:
        raise ValueError(f"cost: {entry} has no multiply-adds in the architecture; have {', '.join(architecture.macs)}")
    return architecture.macs[entry]
