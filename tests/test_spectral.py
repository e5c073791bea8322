"""Convolutions by frequencies: the library's but for rounding, nearer to the exact ones, and only where quicker."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clients import spectral
from clients.accelerator import CPU
from clients.spectral import across, correlated, down, worth
from clients.train import train
from prfl import models
from prfl.masks import DENSE, Mask
from prfl.samples import Samples
from prfl.types import Group, Member, Task, Update, Work

MODEL = models.build("two_cnn", (1, 28, 28), 10, 0, {"channels": (32, 64), "hidden": 32})
PARAMS = models.values(MODEL)
FIRST = Group(32, (Member("conv1.weight", 0), Member("conv1.bias", 0), Member("conv2.weight", 1)))
DATA = Samples(
    torch.randn(44, 1, 28, 28, generator=torch.Generator().manual_seed(1)),
    torch.randint(0, 10, (44,), generator=torch.Generator().manual_seed(2)),
)
AVX2 = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"
quick = pytest.mark.skipif(not AVX2, reason="not measured on such a processor")


def task(work: Work, mask: Mask = DENSE) -> Task:
    return Task(3, 7, PARAMS, mask, work, seed=5)


def by_library(job: Task) -> Update:
    return train(replace(job, work=replace(job.work, fast=False)), MODEL, DATA)


def error(got: Tensor, exact: Tensor) -> float:
    """The largest, as a share of the largest value."""
    return float((got - exact).abs().max() / exact.abs().max())


def test_a_correlation_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0]])[None, None].requires_grad_()
    kernel = torch.tensor([[1.0, 10.0], [0.0, 100.0]])[None, None].requires_grad_()
    out = correlated(x, kernel, (0, 1))
    torch.testing.assert_close(out, torch.tensor([[[[10.0, -79.0, 302.0, 0.0]]]]), rtol=0, atol=1e-4)
    out.backward(torch.tensor([[[[1.0, 0.0, 0.0, 2.0]]]]))
    assert x.grad is not None
    assert kernel.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[[[10.0, 0.0, 2.0], [100.0, 0.0, 0.0]]]]), rtol=0, atol=1e-4)
    torch.testing.assert_close(kernel.grad, torch.tensor([[[[0.0, 1.0], [6.0, 0.0]]]]), rtol=0, atol=1e-4)


@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    taps=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    padding=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    counts=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_every_shape_and_its_gradients_are_within_a_millionth(
    size: tuple[int, int], taps: tuple[int, int], padding: tuple[int, int], counts: tuple[int, int, int], seed: int
) -> None:
    batch, inputs, outputs = counts
    size = (max(size[0], taps[0] - 2 * padding[0]), max(size[1], taps[1] - 2 * padding[1]))
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, inputs, *size, generator=g).requires_grad_()
    kernel = torch.randn(outputs, inputs, *taps, generator=g).requires_grad_()
    exact_x, exact_kernel = x.detach().double().requires_grad_(), kernel.detach().double().requires_grad_()
    exact = F.conv2d(exact_x, exact_kernel, padding=padding)
    slope = torch.randn(exact.shape, generator=g)
    out = correlated(x, kernel, padding)
    assert out.shape == exact.shape
    want = torch.autograd.grad(exact, [exact_x, exact_kernel], slope.double())
    ours = (out, *torch.autograd.grad(out, [x, kernel], slope))
    for got, double, factors in zip(
        ours, (exact.detach(), *want), ((x, kernel), (slope, kernel), (x, slope)), strict=True
    ):
        most = float(factors[0].detach().norm() * factors[1].detach().norm())  # no sum of products is larger
        torch.testing.assert_close(got.detach().double(), double, rtol=0, atol=1e-6 * most)


def test_the_error_is_smaller_than_that_of_the_library() -> None:
    g = torch.Generator().manual_seed(0)
    x, kernel = torch.randn(20, 32, 14, 14, generator=g), torch.randn(64, 32, 5, 5, generator=g)
    exact = F.conv2d(x.double(), kernel.double(), padding=2)
    ours = error(correlated(x, kernel, (2, 2)), exact)
    assert ours < 5e-7
    assert ours < error(F.conv2d(x, kernel, padding=2), exact)


@pytest.mark.parametrize(("size", "taps", "padding"), [(14, 5, 2), (7, 4, 1), (1, 1, 0), (6, 3, 5)])
def test_shapes_of_both_axes(size: int, taps: int, padding: int) -> None:
    length, outputs = size + padding, size + 2 * padding - taps + 1
    low = length // 2 + 1
    assert [m.shape for m in down(size, taps, padding)] == [(2 * low, size), (2 * low, taps), (outputs, 2 * low)]
    sides = [(3 * length, 2 * size), (3 * length, 2 * taps), (2 * outputs, 3 * length)]
    assert [m.shape for m in across(size, taps, padding)] == sides
    assert {m.dtype for m in (*down(size, taps, padding), *across(size, taps, padding))} == {torch.float32}


@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "size", "taps", "padding", "want"),
    [
        (20, 32, 64, 14, 5, 2, True),
        (20, 24, 48, 14, 5, 2, True),
        (20, 17, 34, 14, 5, 2, True),
        (20, 32, 64, 12, 5, 0, True),
        (20, 32, 64, 28, 5, 2, True),
        (20, 32, 64, 7, 5, 2, True),
        (20, 16, 32, 14, 7, 3, True),
        (20, 32, 64, 6, 5, 2, False),  # little work
        (5, 32, 64, 14, 5, 2, False),  # few images a kernel
        (20, 16, 32, 14, 5, 2, False),  # even
        (20, 1, 32, 28, 5, 2, False),
        (64, 10, 20, 12, 5, 0, False),
        (20, 256, 256, 8, 3, 1, False),  # small kernels
    ],
)
def test_where_it_is_worth_it_is_what_the_bench_found(
    batch: int, inputs: int, outputs: int, size: int, taps: int, padding: int, want: bool
) -> None:
    kernels = torch.Size((outputs, inputs, taps, taps))
    assert worth(torch.Size((batch, inputs, size, size)), kernels, (padding, padding)) is want


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Of the kernels that go by frequencies."""
    seen: list[tuple[int, ...]] = []

    def noted(x: Tensor, kernel: Tensor, padding: tuple[int, int]) -> Tensor:
        seen.append(tuple(kernel.shape))
        return correlated(x, kernel, padding)

    monkeypatch.setattr(spectral, "correlated", noted)
    return seen


@quick
@pytest.mark.parametrize(
    "work",
    [Work(lr=0.05), Work(epochs=2, lr=0.05, momentum=0.9, weight_decay=1e-3, clip=1.0), Work(steps=3, report="change")],
)
def test_training_is_that_of_the_library_but_for_rounding(work: Work, shapes: list[tuple[int, ...]]) -> None:
    """Batches of twenty go by frequencies, the last one of four does not."""
    job = task(replace(work, batch=20))
    want = by_library(job)
    ours = train(job, MODEL, DATA)
    assert shapes == [(64, 32, 5, 5)] * (2 * work.epochs)
    for k, v in want.delta.items():
        assert not torch.equal(ours.delta[k], v)
        torch.testing.assert_close(ours.delta[k], v, rtol=0, atol=1e-4 * float(v.abs().max()), msg=k)
    assert ours.metrics == pytest.approx(want.metrics, rel=1e-5)
    again = train(job, MODEL, DATA)
    assert all(torch.equal(again.delta[k], v) for k, v in ours.delta.items())


@quick
def test_cut_channels_go_by_frequencies_too_and_are_scaled(shapes: list[tuple[int, ...]]) -> None:
    job = task(Work(batch=20, steps=1, lr=0.05, scaler=True), Mask(channels={FIRST: torch.arange(24)}))
    want = by_library(job)
    ours = train(job, MODEL, DATA)
    assert shapes == [(64, 24, 5, 5)]
    for k, v in want.delta.items():
        torch.testing.assert_close(ours.delta[k], v, rtol=0, atol=1e-4 * float(v.abs().max()), msg=k)


@quick
def test_a_bias_is_added_and_the_network_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(32, 64, 5, padding=2), nn.Conv2d(64, 32, 5, bias=False))
    x = torch.randn(20, 32, 14, 14)
    want = net(x)
    with spectral.lent(net, CPU):
        assert all("forward" in vars(layer) for layer in net)
        ours = net(x)
        assert not torch.equal(ours, want)
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net(x[0]), want[0], rtol=1e-4, atol=1e-5)  # a single image
        assert net.double()(x.double()).dtype == torch.float64
    assert not any("forward" in vars(layer) for layer in net)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(32, 64, 5, stride=2),
        nn.Conv2d(32, 64, 5, dilation=(1, 2)),
        nn.Conv2d(32, 64, 5, groups=2),
        nn.Conv2d(32, 64, 5, padding="same"),
        nn.Conv2d(32, 64, 5, padding=2, padding_mode="reflect"),
        nn.ConvTranspose2d(32, 64, 5),
    ],
    ids=["stride", "dilation", "groups", "same", "reflect", "transposed"],
)
def test_other_layers_are_left_to_the_library(layer: nn.Module) -> None:
    with spectral.lent(layer, CPU):
        assert "forward" not in vars(layer)


def test_what_was_not_measured_is_left_to_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(32, 64, 5)
    with spectral.lent(layer, torch.device("cuda")):
        assert "forward" not in vars(layer)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with spectral.lent(layer, CPU):
        assert "forward" not in vars(layer)
