"""Coupled channels and costs."""

import pytest
import torch
from torch import nn
from zoo import ZOO

from prfl import models
from prfl.groups import architecture
from prfl.types import Group, Member


class Net(nn.Module):
    """Layers by name, and how they are put together."""

    def __init__(self, call, **layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.call = call

    def forward(self, x):
        return self.call(self.layers, x)


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **options)


def cut_axes(model, x):
    """Entry and axis of everything that can be cut."""
    return {(m.entry.removeprefix("layers."), m.axis) for g in architecture(model, x).groups for m in g.members}


def test_golden_convolutions_flattened_into_linear():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(18, 5),
        nn.Linear(5, 3),
    )
    arch = architecture(model, torch.zeros(4, 1, 8, 8))
    assert arch.groups == (
        Group(
            2,
            (
                Member("0.weight", 0),
                Member("0.bias", 0),
                Member("1.weight", 0),
                Member("1.bias", 0),
                Member("1.running_mean", 0),
                Member("1.running_var", 0),
                Member("5.weight", 1, repeat=9),
            ),
        ),
        Group(5, (Member("5.weight", 0), Member("5.bias", 0), Member("6.weight", 1))),
    )
    assert arch.macs == {"0.weight": 36.0, "5.weight": 1.0, "6.weight": 1.0}


@pytest.mark.parametrize(("name", "shape", "options"), ZOO)
def test_the_zoo_can_be_cut_everywhere_but_at_inputs_and_classes(name, shape, options):
    model = models.build(name, shape, 10, 0, options)
    params = models.values(model)
    arch = architecture(model, torch.zeros(1, *shape))
    weights = [k for k, v in params.items() if v.dim() > 1]
    assert list(arch.macs) == weights
    covered: dict[tuple[str, int], list[int]] = {}
    for g in arch.groups:
        for m in g.members:
            covered.setdefault((m.entry, m.axis), []).extend(range(m.offset, m.offset + g.size * m.repeat))
    for (entry, axis), at in covered.items():
        assert sorted(at) == list(range(params[entry].shape[axis]))
    every = {(k, axis) for k, v in params.items() for axis in range(min(2, v.dim()))}
    head = weights[-1].removesuffix("weight")
    assert every - covered.keys() == {(weights[0], 1), (head + "weight", 0), (head + "bias", 0)}


def test_shortcuts_couple_the_channels_they_join():
    model = models.build("resnet18", (3, 16, 16), 10, 0, {"width": 4, "stem": "cifar"})
    first = {m.entry for m in architecture(model, torch.zeros(1, 3, 16, 16)).groups[0].members if m.axis == 0}
    convs = {k for k in first if "conv" in k}
    assert convs == {"conv1.weight", "layer1.0.conv2.weight", "layer1.1.conv2.weight"}


def test_concatenated_channels_have_offsets():
    model = Net(
        lambda n, x: n["fc"](torch.cat([n["a"](x), n["b"](x).relu()], 1).mean((2, 3))),
        a=conv(1, 2),
        b=conv(1, 3),
        fc=nn.Linear(5, 2),
    )
    assert architecture(model, torch.zeros(1, 1, 4, 4)).groups == (
        Group(2, (Member("layers.a.weight", 0), Member("layers.fc.weight", 1))),
        Group(3, (Member("layers.b.weight", 0), Member("layers.fc.weight", 1, offset=2))),
    )


def test_channels_beside_something_uncuttable_stay_whole():
    beside_input = Net(
        lambda n, x: n["d"](n["c"](torch.cat([x, n["a"](x)], 1))), a=conv(3, 4), c=conv(7, 4), d=conv(4, 2)
    )
    assert cut_axes(beside_input, torch.zeros(1, 3, 6, 6)) == {("c.weight", 0), ("d.weight", 1)}


def test_channels_added_to_the_input_stay_whole():
    model = Net(lambda n, x: n["d"](n["b"](n["a"](x)) + x), a=conv(3, 4), b=conv(4, 3), d=conv(3, 2))
    assert cut_axes(model, torch.zeros(1, 3, 6, 6)) == {("a.weight", 0), ("b.weight", 1)}


def test_channels_added_to_the_output_stay_whole():
    model = Net(lambda n, x: n["a"](x) + n["c"](n["b"](x)), a=conv(3, 4), b=conv(3, 5), c=conv(5, 4))
    assert cut_axes(model, torch.zeros(1, 3, 6, 6)) == {("b.weight", 0), ("c.weight", 1)}


def test_depthwise_convolutions_follow_their_input():
    model = Net(lambda n, x: n["c"](n["b"](n["a"](x))), a=conv(1, 4), b=conv(4, 4, groups=4), c=conv(4, 2))
    arch = architecture(model, torch.zeros(1, 1, 6, 6))
    members = (Member("layers.a.weight", 0), Member("layers.b.weight", 0), Member("layers.c.weight", 1))
    assert arch.groups == (Group(4, members),)
    assert arch.macs["layers.b.weight"] == 36


@pytest.mark.parametrize("odd", [conv(4, 4, groups=2), conv(4, 8, groups=4), nn.GroupNorm(2, 4), nn.PReLU(4)])
def test_channels_through_other_layers_stay_whole(odd):
    outputs = getattr(odd, "out_channels", 4)
    model = Net(
        lambda n, x: n["d"](n["c"](n["odd"](n["a"](x)))), a=conv(1, 4), odd=odd, c=conv(outputs, 3), d=conv(3, 2)
    )
    assert cut_axes(model, torch.zeros(1, 1, 6, 6)) == {("c.weight", 0), ("d.weight", 1)}


def test_split_channels_stay_whole():
    model = Net(
        lambda n, x: n["e"](n["b"](n["a"](x)[:, :2]) + n["c"](n["a"](x)[:, 2:])),
        a=conv(1, 5),
        b=conv(2, 4),
        c=conv(3, 4),
        e=conv(4, 2),
    )
    assert cut_axes(model, torch.zeros(1, 1, 6, 6)) == {("b.weight", 0), ("c.weight", 0), ("e.weight", 1)}


def test_embeddings_cost_nothing_and_what_cannot_be_counted_has_no_row():
    model = Net(
        lambda n, x: n["fc"](n["rnn"](n["words"](x))[0][:, -1]),
        words=nn.Embedding(7, 3),
        rnn=nn.LSTM(3, 4, batch_first=True),
        fc=nn.Linear(4, 7),
    )
    macs = architecture(model, torch.zeros(2, 5, dtype=torch.long)).macs
    assert macs == {"layers.words.weight": 0.0, "layers.fc.weight": 1.0}


class Own(nn.Module):
    """A layer of somebody's own."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.table)


def test_layers_that_are_not_torchs_are_counted_too():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ConvTranspose2d(3, 2, 2, 2), nn.Flatten(), Own(128, 4), nn.Linear(4, 2)
    )
    macs = architecture(model, torch.zeros(2, 1, 6, 6)).macs
    assert macs == {"0.weight": 16.0, "1.weight": 16.0, "3.table": 1.0, "4.weight": 1.0}


def test_a_layer_that_is_used_twice_costs_twice():
    model = Net(lambda n, x: n["b"](n["a"](n["a"](x))), a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    assert architecture(model, torch.zeros(2, 4)).macs == {"layers.a.weight": 2.0, "layers.b.weight": 1.0}


def test_linear_layers_over_a_sequence_cost_every_place():
    assert architecture(nn.Linear(3, 4), torch.zeros(2, 5, 3)).macs == {"weight": 5.0}


def test_same_answer_twice_and_the_model_is_not_touched():
    model = models.build("resnet18", (3, 16, 16), 10, 0, {"width": 4})
    model.fc.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = architecture(model, x)
    assert architecture(model, x[:1]) == first
    assert model.training
    assert not model.fc.weight.requires_grad
    assert model.conv1.weight.grad is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
