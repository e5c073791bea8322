"""Training on a device that is named: the CPU as the default to the bit, and no step that mixes it with another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from world import World

from clients import accelerator
from clients import train as training
from clients.local import Local
from clients.train import train
from prfl import models
from prfl.config import ConfigError
from prfl.cut import Cut
from prfl.groups import architecture
from prfl.partition import Noise
from prfl.problem import Problem
from prfl.samples import Dataset, Samples
from prfl.types import Task, Work

aten = torch.ops.aten
BORROWED = training._borrowed
SHORT = Work(steps=3, batch=8, lr=0.1)
WORKS = {
    "plain": ("", SHORT),
    "all of SGD": ("", replace(SHORT, momentum=0.9, proximal=0.1, weight_decay=0.01, clip=1.0)),
    "absent": ("channels", replace(SHORT, absent="zero", labels=True, scaler=True)),
    "bce": ("", replace(SHORT, loss="bce", statistics="static")),
    "patience": ("", Work(epochs=4, batch=8, patience=1)),
    "gradient": ("channels", replace(SHORT, report="gradient2")),
    "dense gradient": ("channels", replace(SHORT, report="gradient", scope="all", window="last")),
    "change": ("weights", replace(SHORT, report="change", scope="all", normalise=True)),
    "regrow": ("weights", replace(SHORT, regrow=0.3)),
    "rungs": ("channels", replace(SHORT, steps=9, rungs=8, distil=True)),
    "personal": ("weights", Work(epochs=2, batch=8, prune=0.2, prune_to=0.1, prune_apart=-1, prune_accuracy=-1)),
    "personal channels": ("channels", Work(epochs=2, batch=8, prune_channels=0.3, channels_to=0.1, holdout=0.2)),
}


class Elsewhere(TorchDispatchMode):
    """Stands for a GPU: the meta device, whose tensors mix with none of the CPU, and what is copied back is zero."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first, places = args[0] if args else None, {t.device for t in tree_leaves(args) if _fills(t)}
        if len(places) > 1 and function is not aten.copy_.default:
            raise RuntimeError(f"{function} on more than one device")
        if isinstance(first, torch.Tensor) and first.is_meta:
            if function is aten._local_scalar_dense.default:
                return 0.0
            if function is aten._to_copy.default and (kwargs or {}).get("device") == accelerator.CPU:
                return torch.zeros(first.shape, dtype=(kwargs or {}).get("dtype") or first.dtype)
        return function(*args, **(kwargs or {}))


def _fills(value: Any) -> bool:
    """A tensor that is more than a number."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


@contextmanager
def borrowed(net: torch.nn.Module, *given: Any) -> Iterator[Any]:
    """As in training, of a network of meta tensors: `tensor.data` can not be set to those, as it can to a GPU's."""
    places = [tensors for m in net.modules() for tensors in (m._parameters, m._buffers)]
    before = [dict(tensors) for tensors in places]
    for tensors in places:
        for k, t in tensors.items():
            if t is not None:
                moved = t.detach().to("meta")
                tensors[k] = torch.nn.Parameter(moved, t.requires_grad) if isinstance(t, torch.nn.Parameter) else moved
    try:
        with BORROWED(net, *given) as entries:
            yield entries
    finally:
        for tensors, old in zip(places, before, strict=True):
            tensors.update(old)


def world() -> tuple[torch.nn.Module, Samples]:
    draw = torch.Generator().manual_seed(0)
    model = models.build("conv2", (1, 8, 8), 4, 0, {"channels": (8, 8), "hidden": 16})
    return model, Samples(torch.randn(40, 1, 8, 8, generator=draw), torch.randint(3, (40,), generator=draw))


def job(unit: Any, work: Work) -> Task:
    model, samples = world()
    params = models.values(model)
    ranking = Cut(unit=unit or "weights").rank(
        {k: v.abs() for k, v in params.items()}, params, architecture(model, samples.x[:1]).groups
    )
    return Task(0, 0, params, ranking.mask(0.5 if unit else 1.0), work, seed=5, density=0.5 if unit else 1.0)


@pytest.mark.parametrize(("unit", "work"), WORKS.values(), ids=WORKS)
def test_no_step_mixes_devices(unit: str, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the result is on the CPU again, as long as it would be had it been trained there."""
    model, samples = world()
    task = job(unit, work)
    before = {k: v.clone() for k, v in models.values(model).items()}
    here = train(task, model, samples)
    monkeypatch.setattr(training, "_borrowed", borrowed)
    with Elsewhere():
        there = train(task, model, samples, torch.device("meta"))
    assert {k: v.device for k, v in there.delta.items()} == dict.fromkeys(here.delta, accelerator.CPU)
    assert there.metrics.keys() == here.metrics.keys()
    assert (there.signal or {}).keys() == (here.signal or {}).keys()
    assert all(v.device == accelerator.CPU for v in (there.signal or {}).values())
    assert all(torch.equal(v, before[k]) for k, v in models.values(model).items())


def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    with Elsewhere():
        there = torch.zeros(3).to("meta")
        assert there.is_meta
        with pytest.raises(RuntimeError, match="device"):
            there + torch.zeros(3)
        assert torch.equal(there.cpu(), torch.zeros(3))


def test_the_cpu_by_name_is_the_default_to_the_bit() -> None:
    small = World()
    parts = [torch.arange(24 * c, 24 * c + 24) for c in range(6)]
    problem = Problem(small.model, Dataset("own", small.all, small.all, 3), small.all, parts, Noise(), 0)
    task = Task(1, 0, small.params, job("", SHORT).mask, SHORT, seed=3)
    default, named = Local(problem).train(task), Local(problem, "cpu").train(task)
    assert all(torch.equal(v, named.delta[k]) for k, v in default.delta.items())
    assert default.metrics == named.metrics


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:-1", "cpu:0", "", "cuda:1000"])
def test_a_device_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^device: no .*have cpu") as line:
        accelerator.found(name)
    assert "\n" not in str(line.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_comes_to_the_same_update_twice_and_close_to_the_cpu() -> None:
    model, samples = world()
    gpu = accelerator.found("cuda")
    one, two, here = (train(job("channels", SHORT), model, samples, d) for d in (gpu, gpu, accelerator.CPU))
    assert all(torch.equal(v, two.delta[k]) for k, v in one.delta.items())
    for k, v in one.delta.items():
        torch.testing.assert_close(v, here.delta[k], atol=1e-3, rtol=1e-2)
