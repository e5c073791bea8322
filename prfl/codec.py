"""The wire format: tasks and updates in an envelope each; no pickle, no names, no shapes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from math import isfinite, prod
from struct import Struct, error
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor

from prfl.bitstream import Layout, Reader, Refused, decode_mask, decode_set, digest, encode_mask, encode_set, name_mask
from prfl.envelope import TASK, UPDATE, Part, Values, look, open_values, raw, seal, seal_values, sealed, unseal
from prfl.masks import Mask
from prfl.types import Task, Tree, Update, Work

__all__ = ["Codec", "Layout", "Refused", "Values", "digest"]

_TASK = Struct("<QQQd")  # client, version, seed, density
_UPDATE = Struct("<QQd")  # client, version, weight
_WORK, _USUAL = get_type_hints(Work), vars(Work())
_LONGEST = 1 << 16  # bytes of JSON

# What no training comes to, and a sum over many clients can bear.
LIGHTEST, HEAVIEST = 1e-6, 1e15  # weights: numbers of samples
FARTHEST = 1e6  # that a weight moves in a task
LOUDEST = 1e20  # signal


@dataclass(frozen=True)
class Codec:
    """How values travel. A receiver reads every kind, whatever its own setting; both sides give the same `Layout`.

    float32: exact. float16: scaled by a power of two per entry, so that none overflows; off by at most 2^-11 of the
    value or 2^-39 of the entry's largest. int8: steps of a 127th of the entry's largest, rounded up or down at random
    from the task's seed: unbiased, off by less than a step (QSGD, Alistarh et al. 2017, section 3.1; the largest in
    place of the norm is ours).
    """

    values: Values = "float32"

    def __post_init__(self) -> None:
        if self.values not in get_args(Values):
            raise ValueError(f"codec: no values {self.values!r}; have {', '.join(get_args(Values))}")

    @property
    def lossless(self) -> bool:
        return self.values == "float32"

    def encode_task(self, task: Task, layout: Layout, *, known: bool = False, apart: bool = False) -> bytes:
        """`known`: the client holds this very mask, 9 bytes stand for it. `apart`: the params travel as increments."""
        if {k: tuple(v.shape) for k, v in task.params.items()} != layout.shapes:
            raise ValueError("the task's parameters are not those of the layout")
        values: list[Part] = []
        if not apart:
            kept = {k: task.mask.gather(k, task.params[k]) for k in layout.shapes}
            values = seal_values(self.values, _checked(kept, kept, layout.sizes(task.mask)), _seed(TASK, task))
        return seal(
            TASK,
            layout,
            [_pack(_TASK, task.client, task.version, task.seed, task.density)],
            [_json({k: v for k, v in vars(task.work).items() if v != _USUAL[k]})],
            [name_mask(task.mask) if known else encode_mask(task.mask, layout)],
            values,
        )

    def decode_task(self, data: bytes, layout: Layout, held: Mask | None = None, joined: Tree | None = None) -> Task:
        """`params` in full shape, zero outside the mask; Refused when it is no task for this model.

        `held`: the mask the client kept from before. `joined`: the params when they came apart.
        """
        fields, work, mask_bytes, values = unseal(data, TASK, layout, 4)
        client, version, seed, density = _unpack(_TASK, fields)
        if not 0 < density <= 1:
            raise Refused(f"density {density:g} is not in (0, 1]")
        mask = decode_mask(mask_bytes, layout, held=held)
        if len(values.data):
            packed = open_values(values, list(layout.shapes), layout.sizes(mask))
            joined = {
                k: packed[k].view(shape) if mask.whole(k) else mask.put(k, packed[k], torch.zeros(shape))
                for k, shape in layout.shapes.items()
            }
        if joined is None:
            raise Refused("values: they came apart and were not joined")
        return Task(client, version, joined, mask, _work(work), seed, density)

    def encode_update(
        self, update: Update, task: Task, layout: Layout, *, carry: Tree | None = None
    ) -> tuple[bytes, Tree | None]:
        """The answer to `task`; a mask that is the task's is not sent.

        `carry`: what rounding withheld so far, in full shape: added before rounding and returned new (error
        feedback, Seide et al. 2014). None when nothing is lost.
        """
        delta, sections = self._laid_out(update, task, layout, carry)
        data = seal(UPDATE, layout, *sections)
        if self.lossless:
            return data, None
        mask, (_, scales, *codes), withheld = update.mask, sections[3], {}
        factors = np.asarray(scales).tolist()
        for (k, shape), v, scale, code in zip(layout.shapes.items(), delta, factors, codes, strict=True):
            lost = torch.as_tensor(code).float().mul_(-scale).add_(v)
            if not isfinite(lost.sum().item()):  # NaN and Inf are no fault of the rounding
                lost.nan_to_num_(0, 0, 0)
            if mask.whole(k):
                withheld[k] = lost.view(shape)
            else:
                withheld[k] = mask.put(k, lost, torch.zeros(shape) if carry is None else carry[k].clone())
        return data, withheld

    def decode_update(self, data: bytes, task: Task, layout: Layout) -> Update:
        """The answer to `task`; Refused when it is none, or no weight, metric, delta or signal to work with.

        Besides NaN and Inf that is what no training comes to; a wrong answer within these bounds is the merge's matter.
        """
        fields, metrics, mask_bytes, values, report = unseal(data, UPDATE, layout, 5)
        client, version, weight = _unpack(_UPDATE, fields)
        if (client, version) != (task.client, task.version):
            raise Refused(f"client {client}, version {version}, not {task.client}, {task.version} as asked")
        scores = _object(metrics, "metrics")
        _accept(weight, scores)
        mask = decode_mask(mask_bytes, layout) if len(mask_bytes.data) else task.mask
        names, sizes = list(layout.shapes), layout.sizes(mask)
        delta, signal = open_values(values, names, sizes, limit=FARTHEST), None
        if len(report.data):
            present = decode_set(report, len(names))
            if present is None:
                raise Refused("signal: no entries")
            reported = _reported(present.tolist(), layout, sizes, task.work)
            signal = open_values(report, *reported, "signal ", LOUDEST)
        return Update(client, version, delta, mask, weight, scores, signal)

    def deliver(
        self, update: Update, task: Task, layout: Layout, *, carry: Tree | None = None
    ) -> tuple[Update, int, Tree | None]:
        """What `decode_update` makes of what `encode_update` writes, the length of that, and what was withheld.

        Where nothing is lost the message is laid out, measured and looked at, but neither written nor read.
        """
        if not self.lossless:
            data, withheld = self.encode_update(update, task, layout, carry=carry)
            return self.decode_update(data, task, layout), len(data), withheld
        moves, sections = self._laid_out(update, task, layout, None)
        scores, signal = _object(Reader(raw(sections[1][0])), "metrics"), update.signal
        _accept(update.weight, scores)
        delta = dict(zip(layout.shapes, moves, strict=True))
        look(delta, "", FARTHEST)
        if signal is not None:
            signal = {k: signal[k].detach().contiguous() for k in layout.shapes if k in signal}
            look(signal, "signal ", LOUDEST)
        mask = decode_mask(Reader(raw(sections[2][0])), layout) if sections[2] else task.mask
        weight = float(update.weight)
        return Update(task.client, task.version, delta, mask, weight, scores, signal), sealed(*sections), None

    def _laid_out(
        self, update: Update, task: Task, layout: Layout, carry: Tree | None
    ) -> tuple[list[Tensor], list[Sequence[Part]]]:
        """The moves with what was withheld before, and the sections of the message."""
        if (update.client, update.version) != (task.client, task.version):
            raise ValueError(f"update of {update.client}, {update.version} for task of {task.client}, {task.version}")
        mask = update.mask
        same = mask is task.mask or digest(mask) == digest(task.mask)
        sizes = layout.sizes(mask)
        delta = _checked(update.delta, layout.shapes, sizes)
        if carry is not None:
            delta = [v + mask.gather(k, carry[k]) for k, v in zip(layout.shapes, delta, strict=True)]
        values = seal_values(self.values, delta, _seed(UPDATE, task))
        signal: list[Part] = []
        if update.signal is not None:
            present = [k in update.signal for k in layout.shapes]
            names, counts = _reported(present, layout, sizes, task.work)
            signal = seal_values(self.values, _checked(update.signal, names, counts), _seed(UPDATE, task, 1))
            signal.insert(0, encode_set(np.array(present)))
        fields = _pack(_UPDATE, update.client, update.version, update.weight)
        metrics = _json({k: float(v) for k, v in update.metrics.items()})
        return delta, [[fields], [metrics], [] if same else [encode_mask(mask, layout)], values, signal]


def _accept(weight: float, metrics: Mapping[str, Any]) -> None:
    """Raises Refused for what no training comes to."""
    if not LIGHTEST <= weight <= HEAVIEST:
        raise Refused(f"weight {weight:g} is not within {LIGHTEST:g} and {HEAVIEST:g}")
    for k, v in metrics.items():
        if type(v) is not float or not isfinite(v) or not k.isprintable():
            raise Refused(f"metrics: {k!a:.40} is no finite number")


def _reported(present: Sequence[bool], layout: Layout, kept: Sequence[int], work: Work) -> tuple[list[str], list[int]]:
    """Names and sizes of a signal's entries."""
    sizes = [prod(shape) for shape in layout.shapes.values()] if work.scope == "all" else kept
    return list(compress(layout.shapes, present)), list(compress(sizes, present))


def _checked(tree: Tree, names: Iterable[str], sizes: Sequence[int]) -> list[Tensor]:
    """The named entries, ready to be written."""
    out = []
    for k, size in zip(names, sizes, strict=True):
        if k not in tree or tree[k].dtype != torch.float32 or tree[k].shape != (size,):
            have = f"{tree[k].dtype} of shape {tuple(tree[k].shape)}" if k in tree else "nothing"
            raise ValueError(f"{k}: torch.float32 of shape ({size},) needed, got {have}")
        out.append(tree[k].detach().contiguous())
    return out


def _seed(kind: int, task: Task, part: int = 0) -> tuple[int, ...]:
    return (kind, part, task.seed, task.client, task.version)


def _pack(form: Struct, *fields: float) -> bytes:
    try:
        return form.pack(*fields)
    except error:
        raise ValueError(f"client, version and seed must be in [0, 2^64), got {fields}") from None


def _unpack(form: Struct, section: Reader) -> tuple[Any, ...]:
    if len(section.data) != form.size:
        raise Refused(f"fields of {len(section.data)} bytes instead of {form.size}")
    return form.unpack(section.data)


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(dict(value), separators=(",", ":")).encode()


def _object(section: Reader, what: str) -> dict[str, Any]:
    try:
        value = json.loads(str(section.data[:_LONGEST], "utf-8"))
    except (ValueError, RecursionError):
        raise Refused(f"{what}: not JSON of at most {_LONGEST} bytes") from None
    if not isinstance(value, dict):
        raise Refused(f"{what}: not a JSON object")
    return value


def _work(section: Reader) -> Work:
    """What is not said is as usual."""
    values = _object(section, "work")
    if odd := values.keys() - _WORK.keys():
        raise Refused(f"work: {min(odd)!a:.40} is unknown")
    for k, v in values.items():
        kind = _WORK[k]
        if type(v) is int and kind is float:
            v = values[k] = float(v) if abs(v) < 2**53 else v
        if not (v in get_args(kind) or (type(v) is kind and (isfinite(v) if kind is float else abs(v) < 2**53))):
            raise Refused(f"work: {k} is {v!a:.40}")
    return Work(**values)
