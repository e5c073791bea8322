"""What a model costs as masked."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from zoo import ZOO

from clients.shrink import shrink
from prfl import cost, models
from prfl.cut import Cut
from prfl.groups import architecture
from prfl.masks import DENSE, Mask
from prfl.types import Architecture, Group, Member

PARAMS = {"conv": torch.zeros(4, 2, 3, 3), "bias": torch.zeros(4), "fc": torch.zeros(5, 16)}
ARCH = Architecture((Group(4, (Member("conv", 0), Member("bias", 0), Member("fc", 1, 4))),), {"conv": 9.0, "fc": 1.0})
HALF = Mask(channels={ARCH.groups[0]: torch.tensor([0, 3])})
BITS = Mask(bits={"fc": torch.arange(80).reshape(5, 16) < 8})


def zoo(name, shape, options):
    model = models.build(name, shape, 10, 0, options)
    params = models.values(model)
    arch = architecture(model, torch.zeros(1, *shape))
    draw = torch.Generator().manual_seed(0)
    scores = {k: torch.rand(v.shape, generator=draw) for k, v in params.items()}
    return model, params, arch, Cut(unit="channels").rank(scores, params, arch.groups)


def forward_flops(model, shape, batch=1):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(batch, *shape))
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "shape", "options"), ZOO)
def test_flops_are_exactly_those_torch_counts_in_the_small_model(name, shape, options):
    model, params, arch, ranking = zoo(name, shape, options)
    for share in (1.0, 0.5, 0.1):
        mask = ranking.mask(share)
        assert cost.flops(params, mask, arch) * 3 == forward_flops(shrink(model, mask), shape, batch=3)


@pytest.mark.parametrize(("name", "shape", "options"), ZOO)
def test_a_training_step_is_at_most_three_forward_passes(name, shape, options):
    model, params, arch, _ = zoo(name, shape, options)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(4, *shape)).sum().backward()
    assert 2 / 3 < counter.get_total_flops() / (4 * cost.TRAINING * cost.flops(params, DENSE, arch)) <= 1


@pytest.mark.parametrize(("name", "shape", "options"), ZOO)
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_memory_is_within_a_half_of_what_training_keeps(name, shape, options, share):
    model, params, arch, ranking = zoo(name, shape, options)
    mask, batch = ranking.mask(share), 20
    small = shrink(model, mask)
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    known = {t.untyped_storage().data_ptr() for t in (x, *small.state_dict().values())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(small(x), torch.zeros(batch, dtype=torch.long))
    loss.backward()
    states = cost.dense_bytes(models.values(small))
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in small.parameters())
    estimated = cost.memory(params, mask, arch, batch)
    assert 1 / 1.5 < estimated / (states + gradients + sum(kept.values())) < 1.5


def test_golden_flops():
    assert cost.flops_by_kind(PARAMS, DENSE, ARCH) == {"conv": 2 * 9 * 72, "linear": 2 * 80}
    assert cost.flops_by_kind(PARAMS, HALF, ARCH) == {"conv": 2 * 9 * 36, "linear": 2 * 40}
    assert cost.flops(PARAMS, HALF, ARCH) == 2 * 9 * 36 + 2 * 40


def test_single_weights_are_cheaper_only_with_sparse_kernels():
    assert cost.flops(PARAMS, BITS, ARCH) == cost.flops(PARAMS, DENSE, ARCH)
    assert cost.flops_by_kind(PARAMS, BITS, ARCH, sparse=True) == {"conv": 2 * 9 * 72, "linear": 2 * 8}


def test_golden_memory():
    held, outputs = 4 * (72 + 4 + 80), 4 * (9 * 4 + 5)
    assert cost.dense_bytes(PARAMS) == held
    assert cost.memory(PARAMS, DENSE, ARCH, batch=10, maps=3.0) == 2 * held + 3 * 10 * outputs
    assert cost.memory(PARAMS, DENSE, ARCH, batch=10, maps=3.0, momentum=True) == 3 * held + 3 * 10 * outputs
    assert cost.memory(PARAMS, BITS, ARCH, batch=10, maps=3.0) == 2 * held + 3 * 10 * outputs
    half, outputs = 4 * (36 + 2 + 40), 4 * (9 * 2 + 5)
    assert cost.memory(PARAMS, HALF, ARCH, batch=1, maps=1.0) == 2 * half + outputs


def test_a_missing_cost_is_an_error():
    without = Architecture(ARCH.groups, {"conv": 9.0})
    for ask in (cost.flops, cost.flops_by_kind, lambda *a: cost.memory(*a, batch=1)):
        with pytest.raises(ValueError, match="fc has no multiply-adds in the architecture; have conv"):
            ask(PARAMS, DENSE, without)
    lstm = nn.LSTM(3, 4)
    with pytest.raises(ValueError, match="weight_ih_l0 has no multiply-adds"):
        cost.flops(models.values(lstm), DENSE, Architecture())


def test_an_empty_batch_is_an_error():
    with pytest.raises(ValueError, match="batch must be 1 or more, got 0"):
        cost.memory(PARAMS, DENSE, ARCH, batch=0)
