"""Fully connected layers that train on their kept weights alone, by products that skip zeros, where that is quicker."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from clients import statistics
from clients.accelerator import measured
from prfl.masks import Mask
from prfl.types import Task, Work

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


@dataclass(frozen=True, eq=False)
class Pack:
    """Where the n kept weights of a layer lie. Its values are held column by column, 1-D; all indices are int32.

    rows: where each row begins, and the columns of its weights (CSR); columns: the same of the transposed matrix.
    by_column: of every value, its place in mask order, which is row by row; by_row: the other way.
    """

    shape: tuple[int, int]
    rows: tuple[Tensor, Tensor]
    columns: tuple[Tensor, Tensor]
    by_column: Tensor
    by_row: Tensor

    @staticmethod
    def of(at: Tensor, shape: tuple[int, int]) -> Pack:
        """at: flat places of the kept weights in the layer's (outputs, inputs), ascending."""
        row = at // shape[1]
        column = at - row * shape[1]
        by_column = column.argsort(stable=True)
        order = torch.arange(len(at), dtype=torch.int32)
        return Pack(
            shape,
            rows=(_begins(row, shape[0]), column.int()),
            columns=(_begins(column, shape[1]), row.index_select(0, by_column).int()),
            by_column=by_column.int(),
            by_row=torch.empty_like(order).scatter_(0, by_column, order),
        )

    def packed(self, kept: Tensor) -> Tensor:
        """Values that are given in mask order."""
        return kept.index_select(0, self.by_column)

    def kept(self, packed: Tensor) -> Tensor:
        """Values in mask order."""
        return packed.index_select(0, self.by_row)


def _begins(indices: Tensor, size: int) -> Tensor:
    """How many indices are smaller, for 0 to size: (size + 1,)."""
    out = torch.zeros(size + 1, dtype=torch.int32)
    out[1:] = torch.bincount(indices, minlength=size).cumsum(0)
    return out


_PACKS: WeakKeyDictionary[Mask, dict[str, Pack]] = WeakKeyDictionary()  # what follows from a mask, found once


def worth(outputs: int, inputs: int, density: float, batch: int) -> bool:
    """Whether sparse products are quicker than dense ones: as `bench/sparse.py` found, no matter what runs beside.

    From about a tenth downwards, where a dense product has ten million multiply-adds.
    """
    return density <= 0.11 and inputs * outputs * batch >= 10_000_000


def packs(net: nn.Module, task: Task, device: torch.device) -> Mapping[str, Pack]:
    """The layers of the network to train packed, by the name of their weights.

    None unless `Work.sparse` asks for it; none where the work asks for gradients or moves the mask, where channels are
    cut, on a GPU, and where torch comes without MKL (on ARM): that was not measured.
    """
    work, mask = task.work, task.mask
    if not work.sparse or not measured(device) or mask.channels or not _fixed(work):
        return {}
    uses = Counter(id(p) for _, p in net.named_parameters(remove_duplicate=False))
    found = {}
    for name, layer in net.named_modules():
        entry = f"{name}.weight" if name else "weight"
        if entry not in mask.bits or type(layer) is not nn.Linear:
            continue
        weight, shape = layer.weight, (layer.out_features, layer.in_features)
        share = mask.count(entry, shape) / weight.numel()
        if weight.requires_grad and uses[id(weight)] == 1 and worth(*shape, share, work.batch):
            known = _PACKS.setdefault(mask, {})
            if entry not in known:
                known[entry] = Pack.of(mask.gather(entry, torch.arange(weight.numel()).view(shape)), shape)
            found[entry] = known[entry]
    return found


@contextmanager
def packed(net: nn.Module, mask: Mask, layers: Mapping[str, Pack]) -> Iterator[None]:
    """While it lasts, these weights are parameters of their own, 1-D as `Pack` has them."""
    linear = {k: cast(nn.Linear, net.get_submodule(k.rpartition(".")[0])) for k in layers}
    full = {k: layer.weight for k, layer in linear.items()}
    try:
        for k, layer in linear.items():
            layer.weight = nn.Parameter(layers[k].packed(mask.gather(k, full[k].data)))
            vars(layer)["forward"] = partial(_linear, layer, layers[k])
        yield
    finally:
        for k, layer in linear.items():
            layer.weight = full[k]
            vars(layer).pop("forward", None)


def _fixed(work: Work) -> bool:
    """Whether the work leaves the mask alone, trains one width, and asks for no gradient."""
    return not (work.regrow or work.prune or work.prune_channels or work.rungs or statistics.needs_gradient(work))


def _linear(layer: nn.Linear, pack: Pack, x: Tensor) -> Tensor:
    out: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), layer.weight, pack)
    out = out.reshape(*x.shape[:-1], len(out.T))
    return out if layer.bias is None else out + layer.bias


def _matrix(places: tuple[Tensor, Tensor], values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(*places, values, shape, check_invariants=False)


class _Product(torch.autograd.Function):
    """x @ W^T, (B, inputs) to (B, outputs); gradients of x, and of the kept values only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, pack: Pack) -> Tensor:
        turned = x.T.contiguous()
        ctx.save_for_backward(turned, values)
        ctx.pack = pack
        out: Tensor = _matrix(pack.rows, pack.kept(values), pack.shape) @ turned
        return out.T

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor, None]:
        turned, values = ctx.saved_tensors
        across = _matrix(ctx.pack.columns, values, ctx.pack.shape[::-1])
        back = (across @ slope.T.contiguous()).T if ctx.needs_input_grad[0] else None
        return back, torch.sparse.sampled_addmm(across, turned, slope, beta=0.0).values(), None
