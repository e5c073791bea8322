"""Coupled channels and costs of any torch model: what the server knows of it besides its values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prfl.types import Architecture, Group, Member

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PLAIN = {nn.Linear, nn.Embedding, *CONVOLUTIONS}  # layers whose costs are known without torch's counter


def architecture(model: nn.Module, example_input: Tensor) -> Architecture:
    """Groups of channels that can only be cut together, and multiply-adds per weight; `model` is not touched.

    example_input: a batch as the model gets it; its values do not matter, its height and width set the costs.
    Inputs, outputs, and channels that reach anything but convolutions (plain or depthwise), linear layers and
    BatchNorm are in no group, hence never cut: a LayerNorm mixes kept and cut channels.
    """
    model = deepcopy(model).eval().requires_grad_()
    return Architecture(_groups(model, example_input), macs(model, example_input))


def macs(model: nn.Module, example: Tensor) -> dict[str, float]:
    """Multiply-adds of one weight per sample; a weight whose use torch cannot count has no row."""
    alone = {}  # modules with one weight
    for name, module in model.named_modules():
        weights = [(_join(name, k), p) for k, p in module.named_parameters(recurse=False) if p.dim() > 1]
        if len(weights) == 1 and not list(module.children()):
            alone[name] = (module, *weights[0])
    plain = all(type(module) in PLAIN for module, *_ in alone.values())
    uses = (_uses if plain else _flops)(model, example)
    embedded = {entry for module, entry, _ in alone.values() if isinstance(module, nn.Embedding)}
    return {
        entry: 0.0 if entry in embedded else uses[name] / (1 if plain else 2 * weight.numel()) / len(example)
        for name, (_, entry, weight) in alone.items()
        if entry in embedded or uses.get(name)
    }


def _uses(model: nn.Module, example: Tensor) -> dict[str, float]:
    """How many outputs, of this batch, a weight of each plain layer has a part in."""
    uses: dict[str, float] = {}

    def count(name: str, module: nn.Module, _: object, out: Tensor) -> None:
        width = module.out_channels if isinstance(module, CONVOLUTIONS) else module.out_features
        uses[name] = uses.get(name, 0.0) + out.numel() / cast(int, width)

    layers = [(k, m) for k, m in model.named_modules() if type(m) in PLAIN and not isinstance(m, nn.Embedding)]
    hooks = [module.register_forward_hook(partial(count, name)) for name, module in layers]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return uses


def _flops(model: nn.Module, example: Tensor) -> dict[str, float]:
    """Operations of any module that torch can count; this import takes seconds and 150 MB."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example)
    return {name.partition(".")[2]: float(sum(ops.values())) for name, ops in counter.get_flop_counts().items()}


def _groups(model: nn.Module, example: Tensor) -> tuple[Group, ...]:
    from torch_pruning import DependencyGraph  # here, because a device does not have it

    names = {module: name for name, module in model.named_modules()}
    with torch.enable_grad():
        graph = DependencyGraph().build_dependency(_with_input(model, example), (example,), verbose=False)
        found = [_group(items, names, graph.is_out_channel_pruning_fn) for items in graph.get_all_groups()]
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    place = {entry: i for i, entry in enumerate(shapes)}
    groups = [
        Group(size, tuple(sorted(members, key=lambda m: (place[m.entry], m.axis, m.offset))))
        for size, members in found
        if members
    ]
    key = [(place[g.members[0].entry], g.members[0].axis, g.members[0].offset) for g in groups]
    ordered = [g for _, g in sorted(zip(key, groups, strict=True), key=lambda pair: pair[0])]
    return tuple(_tiling(ordered, shapes))


def _with_input(model: nn.Module, example: Tensor) -> nn.Module:
    """The model behind a layer that is not its own, so that channels tied to the input are seen and stay whole."""
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(example.dim())
    return nn.Sequential(norm(example.shape[1]), model) if norm and example.is_floating_point() else model


def _group(items: Iterable[Any], names: Mapping[nn.Module, str], is_out: Any) -> tuple[int, set[Member]]:
    """Size and members of what torch-pruning found, without members where it has to stay whole."""
    size, members = 0, set()
    for item in items:
        node, module, out = item.dep.target, item.dep.target.module, is_out(item.dep.handler)
        size = size or len(item.idxs)  # the first item is the root: all output channels of one layer
        if (out and not node.outputs) or not isinstance(module, nn.Module):  # the model's output, a bare parameter
            return size, set()
        state = [k for k, v in module.state_dict().items() if v.is_floating_point()]
        if not state:
            continue
        axes, layout = _axes(module, out), _layout(item.idxs, item.root_idxs, size)
        if not axes or layout is None or module not in names or not set(state) <= axes.keys() | {"bias"}:
            return size, set()
        members |= {Member(_join(names[module], k), axes[k], *layout) for k in state if k in axes}
    return size, members


def _axes(module: nn.Module, out: bool) -> dict[str, int]:
    """Which axis of each of a layer's tensors holds its output (or input) channels; empty: it cannot be cut."""
    if isinstance(module, _BatchNorm):
        return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0)
    plain = isinstance(module, nn.Linear)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        depthwise = module.groups == module.in_channels == module.out_channels
        plain = module.groups == 1 or depthwise
        out = out or (depthwise and module.groups > 1)
    if not plain:
        return {}
    return {"weight": 0, "bias": 0} if out else {"weight": 1}


def _layout(at: Sequence[int], roots: Sequence[int], size: int) -> tuple[int, int] | None:
    """Repeat and offset, if channel c lies at `repeat` indices from `offset + c * repeat`."""
    repeat, offset = len(at) // size, min(at)
    pairs = sorted(zip(at, roots, strict=True))
    return (repeat, offset) if pairs == [(offset + i, i // repeat) for i in range(size * repeat)] else None


def _tiling(groups: list[Group], shapes: Mapping[str, Sequence[int]]) -> list[Group]:
    """Groups whose axes are covered without gap or overlap; others leave, which may uncover further axes."""
    spans: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for g in groups:
        for m in g.members:
            spans.setdefault((m.entry, m.axis), []).append((m.offset, m.offset + g.size * m.repeat))
    broken = set()
    for (entry, axis), parts in spans.items():
        ends = [0, *(b for _, b in sorted(parts))]
        if [a for a, _ in sorted(parts)] != ends[:-1] or ends[-1] != shapes[entry][axis]:
            broken.add((entry, axis))
    kept = [g for g in groups if not any((m.entry, m.axis) in broken for m in g.members)]
    return kept if len(kept) == len(groups) else _tiling(kept, shapes)


def _join(module: str, entry: str) -> str:
    return f"{module}.{entry}" if module else entry
