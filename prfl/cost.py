"""What a model costs as masked: FLOPs, memory, bytes."""

from __future__ import annotations

from math import prod

from prfl.masks import Mask, prunable
from prfl.types import Architecture, Tree

TRAINING = 3.0
"""FLOPs of a training step over those of its forward pass, *ours*: backward is two products of the forward's size.

Slightly high for the first layer, whose input needs no gradient.
"""

MAPS = 2.0
"""Activation values kept for the backward pass per output value of a layer, *ours*: before and after its nonlinearity.

The model zoo keeps 1.6 to 2.9 (pools and BatchNorm add to it).
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


def dense_bytes(params: Tree) -> int:
    """Bytes of all values of the full model."""
    return sum(v.numel() * v.element_size() for v in params.values())


def _macs(architecture: Architecture, entry: str) -> float:
    if entry not in architecture.macs:
        raise ValueError(f"cost: {entry} has no multiply-adds in the architecture; have {', '.join(architecture.macs)}")
    return architecture.macs[entry]
