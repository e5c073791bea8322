"""Layers trained on their kept weights alone: what masked dense training comes to, but for rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from clients import sparse
from clients.accelerator import CPU
from clients.outcome import Diverged
from clients.sparse import Pack, worth
from clients.train import train
from prfl import models
from prfl.cut import Cut
from prfl.masks import Mask
from prfl.samples import Samples
from prfl.types import Group, Member, Task, Tree, Update, Work

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch comes without MKL here"),
]

INPUTS, HIDDEN = 28 * 28, (800, 200)
WORKS = {
    "plain": Work(steps=6, lr=0.1),
    "all of SGD": Work(epochs=2, lr=0.05, momentum=0.9, weight_decay=1e-3, proximal=0.1),
    "clip": Work(steps=6, lr=0.5, clip=0.2),
    "change": Work(steps=4, report="change", scope="all", normalise=True),
    "patience, bce": Work(epochs=3, patience=1, loss="bce"),
}


def mlp(seed: int = 0) -> nn.Module:
    return models.build("mlp", (1, 28, 28), 10, seed, {"hidden": HIDDEN})


MODEL = mlp()
PARAMS = models.values(MODEL)
SPARSE = Cut().rank({k: v.abs() for k, v in PARAMS.items()}, PARAMS).mask(0.06)
DATA = Samples(
    torch.randn(50, 1, 28, 28, generator=torch.Generator().manual_seed(1)),
    torch.randint(0, 10, (50,), generator=torch.Generator().manual_seed(2)),
)


def task(work: Work, mask: Mask = SPARSE, skip: bool = True, params: Tree = PARAMS) -> Task:
    return Task(3, 7, params, mask, replace(work, sparse=skip), seed=5)


def packs(work: Work, mask: Mask = SPARSE, model: nn.Module = MODEL, device: torch.device = CPU) -> list[str]:
    return list(sparse.packs(model, task(work, mask), device))


def check_close(ours: Tree, want: Tree) -> None:
    """The stated tolerance: a ten-thousandth of the entry's largest value."""
    assert list(ours) == list(want)
    for k, v in want.items():
        assert ours[k].shape == v.shape
        torch.testing.assert_close(ours[k], v, rtol=0, atol=1e-4 * float(v.abs().max()), msg=k)


def same(one: Update, other: Update) -> bool:
    return one.metrics == other.metrics and all(torch.equal(v, other.delta[k]) for k, v in one.delta.items())


def test_a_pack_by_hand() -> None:
    bits = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)
    pack = Pack.of(bits.flatten().nonzero().flatten(), (3, 4))
    assert [v.tolist() for v in pack.rows] == [[0, 2, 4, 5], [1, 3, 0, 3, 1]]
    assert [v.tolist() for v in pack.columns] == [[0, 1, 3, 3, 5], [1, 0, 2, 0, 1]]
    kept = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])  # 0 1 0 2 | 3 0 0 4 | 0 5 0 0
    assert pack.packed(kept).tolist() == [3.0, 1.0, 5.0, 2.0, 4.0]
    assert torch.equal(pack.kept(pack.packed(kept)), kept)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 40), (40,)])
def test_a_layer_and_its_gradients_in_double_precision(shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(40, 30, bias=bias).double()
    mask = Mask({"weight": torch.rand(30, 40, generator=torch.Generator().manual_seed(0)) < 0.1})
    layer.weight.data.mul_(mask.bits["weight"])
    x, slope = torch.randn(shape, dtype=torch.float64).requires_grad_(), torch.randn(30, dtype=torch.float64)
    want = layer(x)
    (want * slope).sum().backward()
    gradients = [x.grad, mask.gather("weight", layer.weight.grad), layer.bias.grad if bias else None]
    x.grad = None
    layer.zero_grad()
    pack = Pack.of(mask.bits["weight"].flatten().nonzero().flatten(), (30, 40))
    with sparse.packed(layer, mask, {"weight": pack}):
        ours = layer(x)
        (ours * slope).sum().backward()
        got = [x.grad, pack.kept(layer.weight.grad), layer.bias.grad if bias else None]
    torch.testing.assert_close(ours, want)
    torch.testing.assert_close(got, gradients)
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("name", WORKS)
def test_training_is_that_of_the_masked_layer_but_for_rounding(name: str) -> None:
    """Both hidden layers are packed: one that has something below it, and the first, which has not."""
    work = replace(WORKS[name], batch=100) if name == "clip" else WORKS[name]
    assert packs(work) == (["fc1.weight", "fc2.weight"] if work.batch == 100 else ["fc1.weight"])
    ours, want = (train(task(work, skip=skip), MODEL, DATA) for skip in (True, False))
    assert not same(ours, want)
    check_close(ours.delta, want.delta)
    assert ours.metrics == pytest.approx(want.metrics, rel=1e-5)
    assert ours.mask is want.mask is SPARSE
    assert (ours.signal is None) is (want.signal is None) is (name != "change")
    if ours.signal and want.signal:
        check_close(ours.signal, want.signal)


def test_twice_and_on_another_skeleton_to_the_bit() -> None:
    for work in WORKS.values():
        first = train(task(work), MODEL, DATA)
        torch.rand(1)
        assert same(first, train(task(work, Mask(SPARSE.bits)), mlp(seed=4), DATA))
        assert same(first, train(task(work), MODEL, DATA))


@pytest.mark.parametrize("lr", [0.1, 1e30])
def test_the_skeleton_is_left_as_it_was(lr: float) -> None:
    before, parts = models.values(MODEL), {k: set(vars(m)) for k, m in MODEL.named_modules()}
    parameters = list(MODEL.parameters())
    try:
        train(task(Work(steps=4, lr=lr)), MODEL, DATA)
    except Diverged:
        assert lr == 1e30
    assert all(torch.equal(v, before[k]) for k, v in models.values(MODEL).items())
    assert {k: set(vars(m)) for k, m in MODEL.named_modules()} == parts
    assert all(a is b and a.grad is None for a, b in zip(MODEL.parameters(), parameters, strict=True))


def test_where_it_is_off_not_a_bit_differs() -> None:
    work = Work(steps=3, clip=1e9)  # clips nothing; without it these networks would be trained stacked
    for mask in (Cut().rank(PARAMS, PARAMS).mask(0.3), Mask()):
        assert packs(Work(), mask) == []
        assert same(*(train(task(work, mask, skip), MODEL, DATA) for skip in (True, False)))
    small = models.build("mlp", (1, 28, 28), 10, 0, {"hidden": (64,)})
    params = models.values(small)
    mask = Cut().rank(params, params).mask(0.02)
    assert packs(Work(), mask, small) == []
    assert same(*(train(task(work, mask, skip, params), small, DATA) for skip in (True, False)))


def test_which_layers_are_packed() -> None:
    assert packs(Work()) == ["fc1.weight"]
    assert packs(Work(batch=100)) == ["fc1.weight", "fc2.weight"]
    assert list(sparse.packs(MODEL, task(Work(), skip=False), CPU)) == []
    for other in (
        Work(regrow=0.1),
        Work(prune=0.1),
        Work(prune_channels=0.1),
        Work(rungs=2),
        Work(report="gradient"),
        Work(report="gradient2", scope="all"),
    ):
        assert packs(other) == []
    assert packs(Work(), device=torch.device("cuda")) == []
    group = Group(HIDDEN[1], (Member("fc2.weight", 0), Member("fc2.bias", 0), Member("fc3.weight", 1)))
    assert packs(Work(), Mask(SPARSE.bits, {group: torch.arange(HIDDEN[1])})) == []
    frozen, tied = mlp(), mlp()
    frozen.fc1.weight.requires_grad_(False)
    tied.again = nn.Linear(INPUTS, HIDDEN[0])
    tied.again.weight = tied.fc1.weight
    assert packs(Work(), model=frozen) == packs(Work(), model=tied) == []


def test_nothing_kept() -> None:
    none = Mask(dict(SPARSE.bits) | {"fc1.weight": torch.zeros(HIDDEN[0], INPUTS, dtype=torch.bool)})
    assert packs(Work(), none) == ["fc1.weight"]
    ours, want = (train(task(Work(steps=3), none, skip), MODEL, DATA) for skip in (True, False))
    assert len(ours.delta["fc1.weight"]) == 0
    torch.testing.assert_close(dict(ours.delta), dict(want.delta))


def test_the_switch() -> None:
    assert worth(512, 3136, 0.1, 20)
    assert not worth(512, 3136, 0.12, 20)
    assert worth(200, 784, 0.1, 100)
    assert not worth(200, 784, 0.01, 20)
    assert not worth(64, 784, 0.01, 100)
