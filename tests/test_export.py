"""An exported file answers as the masked model, whatever was cut, and is really smaller where channels were."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import ZOO

from clients import export
from prfl import checkpoint, cli, config, models, problem
from prfl.cut import Cut
from prfl.evaluate import estimate_norms
from prfl.groups import architecture
from prfl.masks import DENSE, Mask
from sim import experiments, plan
from sim.run import simulate

NETS = [row for row in ZOO if row[0] in ("mlp", "conv2", "conv2_mnist") or row[2].get("stem") == "cifar"]
FORMATS = ["pt2", "safetensors", "onnx"]


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    """Without its extra, onnx is left out."""
    if getattr(request.node, "callspec", None) and "onnx" in request.node.callspec.params.values():
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")


def net(name: str, shape: Any, options: Any) -> nn.Module:
    """A model whose norms are away from their start."""
    model, draw = models.build(name, shape, 10, 0, options), torch.Generator().manual_seed(1)
    for k, v in models.entries(model).items():
        if v.dim() == 1:
            v.copy_(torch.rand(v.shape, generator=draw) + 0.5 if "var" in k else torch.randn(v.shape, generator=draw))
    return model.eval()


def cut(model: nn.Module, shape: Any, unit: Any, share: float = 0.3) -> Mask:
    params = models.values(model)
    return Cut(unit).rank(params, params, architecture(model, torch.zeros(1, *shape)).groups).mask(share)


def about(name: str, shape: Any, options: Any) -> dict[str, Any]:
    return {"model": {"name": name, **options}, "shape": shape, "classes": 10}


def opened(path: Path) -> Any:
    """A file as somebody else would open it."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    if path.suffix == ".safetensors":
        return export.load(path)
    from onnxruntime import InferenceSession

    session = InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max().detach() / max(1.0, float(b.detach().abs().max())))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("unit", ["channels", "weights"])
@pytest.mark.parametrize(("name", "shape", "options"), NETS)
def test_a_file_answers_as_the_masked_model(
    name: str, shape: Any, options: Any, unit: str, form: Any, tmp_path: Path
) -> None:
    model, draw = net(name, shape, options), torch.Generator().manual_seed(2)
    mask, before = cut(model, shape, unit), models.values(model)
    out = tmp_path / "deep" / f"model.{form}"
    made = export.export(model, mask, torch.randn(4, *shape, generator=draw), form, out, about(name, shape, options))
    assert made.difference <= 1e-5
    assert made.size == out.stat().st_size
    assert made.kept == sum(mask.count(k, v.shape) for k, v in before.items()) < made.weights
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    assert all(v.equal(before[k]) for k, v in models.entries(model).items())
    again = opened(out)
    for batch in (1, 5):
        x = torch.randn(batch, *shape, generator=draw)
        with torch.no_grad():
            assert far(again(x), export.masked(model, mask)(x)) < 1e-5
    dense = export.export(model, DENSE, x, form, tmp_path / f"dense.{form}", about(name, shape, options))
    assert dense.kept == dense.weights
    if dense.weights > 5000:  # or names and shapes weigh more
        assert made.size < 0.75 * dense.size if unit == "channels" else made.size > 0.95 * dense.size


def test_safetensors_say_what_they_are(tmp_path: Path) -> None:
    name, shape, options = NETS[0]
    model = net(name, shape, options)
    mask = cut(model, shape, "channels")
    export.export(model, mask, torch.randn(2, *shape), "safetensors", tmp_path / "x", about(name, shape, options))
    with safe_open(tmp_path / "x", framework="pt") as file:
        told = json.loads(file.metadata()["about"])
    assert (told["model"], told["classes"]) == ({"name": "mlp", "hidden": [12, 6]}, 10)
    assert [(g["size"], g["kept"]) for g in told["mask"]] == [(g.size, len(k)) for g, k in mask.channels.items()]
    assert {k: tuple(v.shape) for k, v in load_file(tmp_path / "x").items()} == {
        k: mask.shape(k, v.shape) for k, v in models.entries(model).items()
    }


def test_a_file_that_answers_otherwise_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(small: nn.Module, x: Tensor, path: Path, about: Any, model: nn.Module) -> Any:
        path.write_bytes(b"x")
        return lambda x: small(x) + 1e-3

    monkeypatch.setitem(export.WRITERS, "pt2", wrong)
    name, shape, options = NETS[0]
    with pytest.raises(ValueError, match=r"^export: outputs of the pt2 file differ from the masked model's by 0.000"):
        export.export(net(name, shape, options), DENSE, torch.randn(2, *shape), "pt2", tmp_path / "m.pt2", {})
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda package: None)
    name, shape, options = NETS[0]
    with pytest.raises(ValueError, match=r"^export: onnx needs onnx, onnxscript, onnxruntime: pip install 'prfl\[onnx"):
        export.export(net(name, shape, options), DENSE, torch.randn(2, *shape), "onnx", tmp_path / "m.onnx", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"format": "pt"}, "is pt, this reads prfl model 1"),
        ({}, "is something else, this reads"),
        ({"format": export.FORMAT}, "is no model that was exported: 'about'"),
        ({"format": export.FORMAT, "about": "{"}, "Expecting property name"),
        ({"model": "os:system"}, "the model os:system is not of the zoo; give its skeleton"),
        ({"model": "mpl"}, "model: no 'mpl', did you mean 'mlp'"),
        ({"model": "mlp"}, "is no model that was exported: Error"),
    ],
)
def test_files_that_are_no_exported_models_are_refused(told: dict[str, Any], message: str, tmp_path: Path) -> None:
    if "model" in told:
        text = json.dumps({**told, "shape": [1, 4, 4], "classes": 3, "mask": []})
        told = {"format": export.FORMAT, "about": text}
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors", told)
    with pytest.raises(ValueError, match=message):
        export.load(tmp_path / "x.safetensors")


def test_a_model_of_ones_own_needs_its_skeleton(tmp_path: Path) -> None:
    name, shape, options = NETS[0]
    model = net(name, shape, options)
    mask, x, out = cut(model, shape, "channels"), torch.randn(3, *shape), tmp_path / "own.safetensors"
    export.export(model, mask, x, "safetensors", out, {**about(name, shape, options), "model": "mine:model"})
    skeleton = models.build(name, shape, 10, 5, options)
    assert far(export.load(out, skeleton)(x), export.masked(model, mask)(x)) < 1e-5


# The command

SMALL = ["data.clients=6", "model={name: mlp, hidden: [16]}", "pacing={name: buffered, in_flight: 4, goal: 2}",
         "work={steps: 2}", "stop={versions: 2}"]  # fmt: skip
STATIC = ["data.set={name: synthetic, shape: [1, 28, 28], samples: 300, test: 60}", "model={name: conv2_mnist}",
          "method={name: heterofl, levels: [1, 0.5]}"]  # fmt: skip


def ran(folder: Path, *changes: str) -> problem.Problem:
    """A run folder with its last checkpoint."""
    experiment = config.load(experiments.path("default"), [*SMALL, *changes])
    simulate(experiment, folder)
    given = problem.build(experiment)
    state = plan.start(plan.of(experiment), given)
    method = plan.of(experiment).parts.method
    params = load_file(folder / "model.safetensors")
    rank = method.ranking(method.saliency(params, None), params, state.architecture)
    checkpoint.save(folder, replace(state, version=2, params=params, rank=rank), {})
    return given


def called(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["prfl", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.parametrize("unit", ["weights", "channels"])
def test_the_command(
    unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    ran(run, f"method={{name: pr_fl, unit: {unit}}}")
    assert called(monkeypatch, run, "--density", "0.25") == 0
    said = capsys.readouterr().out
    assert f"{run / 'export-0.25.pt2'}: " in said
    assert "outputs as of the masked model within " in said
    assert ("single weights are pruned" in said) == (unit == "weights")
    assert called(monkeypatch, run, "--format", "safetensors", "--out", tmp_path / "m.safetensors") == 0
    small, whole = opened(run / "export-0.25.pt2"), export.load(tmp_path / "m.safetensors")
    mask = checkpoint.load(run).state.rank.mask(0.25)
    model = models.build("mlp", (1, 8, 8), 10, 0, {"hidden": (16,)})
    models.load(model, load_file(run / "model.safetensors"))
    x = torch.rand(9, 1, 8, 8)
    assert far(small(x), export.masked(model, mask)(x)) < 1e-5 < far(small(x), model(x))
    assert far(whole(x), model(x)) < 1e-5
    shutil.rmtree(run / "state")
    assert called(monkeypatch, run, "--density", "1") == 0
    assert far(opened(run / "export-1.pt2")(x), model(x)) < 1e-5


def test_norms_that_clients_leave_alone_are_set_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ran(tmp_path, *STATIC)
    assert called(monkeypatch, tmp_path, "--density", "0.5") == 0
    assert "BatchNorm statistics are taken from training samples" in capsys.readouterr().out
    state = checkpoint.load(tmp_path).state
    models.load(given.model, state.params)
    assert state.params["bn1.running_var"].equal(torch.ones(10))  # nobody has trained it
    want = export.masked(given.model, state.rank.mask(0.5))
    x, _ = given.dataset.test.batch(torch.arange(20))
    before = want(x)
    with torch.no_grad():
        estimate_norms(want, given.dataset.train)
    got = opened(tmp_path / "export-0.5.pt2")(x)
    assert far(got, want(x)) < 1e-5 < far(got, before)


def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    ran(run)
    before = sorted(p for p in run.rglob("*") if p.parent.name != "state")
    mistakes: list[tuple[list[object], str]] = [
        ([tmp_path], f"export: {tmp_path} holds no run"),
        ([run, "--density", "0"], "density must be in (0, 1], got 0"),
        ([run, "--density", "nan"], "density must be in (0, 1], got nan"),
        ([run, "--format", "tflite"], "'tflite' is not one of 'pt2', 'onnx', 'safetensors'"),
        ([run, "--format", "safetensors", "--out", run / "model.safetensors"], "is the run's own; choose another file"),
    ]
    for arguments, message in mistakes:
        assert called(monkeypatch, *arguments) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    shutil.rmtree(run / "state")
    assert called(monkeypatch, run, "--density", "0.5") == 2
    assert "the run has no checkpoint in state/, hence no ranking; only density 1 can be had" in capsys.readouterr().err
    assert sorted(p for p in run.rglob("*") if p.parent.name != "state") == [p for p in before if p != run / "state"]
    (run / "model.safetensors").unlink()
    assert called(monkeypatch, run) == 2
    assert "has no model yet" in capsys.readouterr().err
