"""The physically small model of a mask: fewer channels, so that training really costs less."""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prfl.masks import Mask
from prfl.models import entries
from prfl.types import Tree


def shrink(model: nn.Module, mask: Mask, params: Tree | None = None) -> nn.Module:
    """A copy with the kept channels only; single weights outside the mask are zero. `model` is left as it is.

    params: full-sized values to take instead of the model's own. For every entry of the result, `packed` equals
    `mask.gather` of the full entry. ValueError: the mask cuts a layer that is no plain or depthwise convolution,
    linear layer or BatchNorm, or keeps single weights of cut channels.
    """
    cut = values(model, mask, entries(model) if params is None else params)
    tensors = model.state_dict(keep_vars=True)
    known: dict[int, object] = {id(tensors[name]): _like(tensors[name], value) for name, value in cut.items()}
    small = deepcopy(model, known)  # what is known is taken, not copied: full tensors are never duplicated
    for name, module in small.named_modules():
        prefix = f"{name}." if name else ""
        if any(mask.sides(prefix + k) for k in module.state_dict() if "." not in k):
            _resize(name, module)
    return small


def hollow(small: nn.Module) -> nn.Module:
    """The model as a mere skeleton: every entry keeps its shape, and takes the room of one number."""
    for tensor in small.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.new_zeros(()).expand(tensor.shape)
    return small


def values(model: nn.Module, mask: Mask, params: Tree) -> Tree:
    """The entries that `shrink` gives the small model, copied from full-sized ones."""
    return {name: _cut(mask, name, params[name]) for name in entries(model)}


def sliced_bits(mask: Mask, entry: str) -> Tensor | None:
    """The mask of single weights inside the small model, in the entry's small shape; None where it has none."""
    bits = mask.bits.get(entry)
    if bits is None:
        return None
    small = mask.slice(entry, bits)
    if int(small.sum()) != mask.count(entry, bits.shape):
        raise ValueError(f"shrink: the mask keeps single weights of {entry} in channels that it cuts")
    return small


def packed(small: nn.Module, mask: Mask) -> Tree:
    """The small model's values, 1-D per entry in mask order, as a copy."""
    out = {}
    for name, tensor in entries(small).items():
        bits = sliced_bits(mask, name)
        out[name] = tensor.flatten().clone() if bits is None else tensor[bits]
    return out


def _cut(mask: Mask, name: str, full: Tensor) -> Tensor:
    bits = sliced_bits(mask, name)
    small = full.clone() if mask.whole(name) else mask.slice(name, full)
    return small if bits is None else small * bits


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _resize(name: str, module: nn.Module) -> None:
    """Let a layer's sizes follow its tensors."""
    if isinstance(module, _BatchNorm):
        module.num_features = len(next(iter(entries(module).values())))
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        depthwise = module.groups == module.in_channels == module.out_channels
        if module.groups > 1 and not depthwise:
            raise ValueError(f"shrink: {name} is a grouped convolution, which cannot be cut by channels")
        module.groups = len(module.weight) if depthwise else 1
        module.out_channels, module.in_channels = len(module.weight), module.weight.shape[1] * module.groups
    else:
        raise ValueError(f"shrink: {name} is a {type(module).__name__}, which cannot be cut by channels")
