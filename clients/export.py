"""A trained model as one file for devices: cut to a density, physically small where channels are cut, and checked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clients.shrink import shrink
from prfl import checkpoint, config, models, problem
from prfl.config import Experiment
from prfl.evaluate import estimate_norms
from prfl.masks import DENSE, Mask
from prfl.problem import Problem
from prfl.types import Group, Member, State

Format = Literal["pt2", "onnx", "safetensors"]

TOLERANCE = 1e-5  # see `Exported.difference`
FORMAT = "prfl model 1"


@dataclass(frozen=True)
class Trained:
    """What a run came to. `model`: full-sized, with its values. `state`: the newest checkpoint's, if there is one."""

    experiment: Experiment
    given: Problem
    model: nn.Module
    state: State | None
    about: Mapping[str, Any]

    def mask(self, density: float) -> Mask:
        """From the run's last ranking. ValueError: out of range, or not 1 and there is no checkpoint."""
        if density == 1:
            return DENSE
        if self.state is None:
            raise ValueError("export: the run has no checkpoint in state/, hence no ranking; only density 1 can be had")
        return self.state.rank.mask(density)

    def calibrated(self, mask: Mask, samples: int) -> nn.Module:
        """The model with BatchNorm statistics as the masked one has them on the first so many training samples."""
        net, train = masked(self.model, mask), self.given.dataset.train
        with torch.no_grad():
            estimate_norms(net, train.subset(torch.arange(min(samples, len(train)))))
        found = models.entries(net)
        kept = {k: found[k] if k.endswith(("running_mean", "running_var")) else v for k, v in _values(self.model)}
        out = deepcopy(self.model)
        models.load(out, kept)
        return out


@dataclass(frozen=True)
class Exported:
    """A file that was written, loaded again and compared on `samples` inputs.

    size: bytes. kept: values that are not pruned, of `weights`. difference: the largest of an output from the masked
    model's, as a share of the largest output where that is above 1.
    """

    path: Path
    size: int
    kept: int
    weights: int
    difference: float
    samples: int


def trained(folder: Path, data_dir: Path | None = None) -> Trained:
    """A run folder's model, from its newest checkpoint or else `model.safetensors`; its data set must be at hand.

    ValueError: there is no run or no model yet, or the data set is missing.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"export: {folder} holds no run")
    experiment = config.load(folder / "config.yaml")
    held = any((folder / "state").glob("*.safetensors"))
    if not held and not (folder / "model.safetensors").is_file():
        raise ValueError(f"export: {folder} has no model yet")
    state = checkpoint.load(folder, checkpoint.own(experiment)).state if held else None
    given = problem.build(experiment, data_dir)
    from safetensors.torch import load_file

    model = deepcopy(given.model).eval()
    models.load(model, state.params if state else load_file(folder / "model.safetensors"))
    about = {
        "experiment": experiment.name,
        "data": experiment.data.set,
        "model": experiment.model,
        "shape": list(given.example.shape[1:]),
        "classes": given.dataset.classes,
    }
    return Trained(experiment, given, model, state, about)


def export(model: nn.Module, mask: Mask, x: Tensor, kind: Format, out: Path, about: Mapping[str, Any]) -> Exported:
    """Write the model as the mask leaves it; the batch size stays free. `out` is written only if its outputs are right.

    model: full-sized, with its values. x: two inputs or more, to trace and to compare with the masked full-sized model.
    about: for the metadata of "safetensors". ValueError: outputs differ, or a package is missing.
    """
    small = shrink(model, mask).eval().requires_grad_(False)
    part = out.with_name(f"{out.name}.part.{kind}")  # torch looks at the ending
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad():
            again = WRITERS[kind](small, x, part, {**about, "mask": _groups(mask)}, model)
            want = masked(model, mask)(x)
            got = torch.cat([again(x[:1]), again(x[1:])])
        difference = float((got - want).abs().max() / max(1.0, float(want.abs().max())))
        if not difference <= TOLERANCE:
            raise ValueError(f"export: outputs of the {kind} file differ from the masked model's by {difference:.2g}")
        size = part.stat().st_size
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    values = models.values(model)
    kept = sum(mask.count(k, v.shape) for k, v in values.items())
    return Exported(out, size, kept, sum(v.numel() for v in values.values()), difference, len(x))


def masked(model: nn.Module, mask: Mask) -> nn.Module:
    """A full-sized copy with every weight outside the mask at zero."""
    net = deepcopy(model).eval().requires_grad_(False)
    models.load(net, mask.apply(models.values(model)))
    return net


def load(path: Path, model: nn.Module | None = None) -> nn.Module:
    """The small model in a safetensors file. ValueError: it is none, or its model is not of the zoo.

    model: the full-sized skeleton, where the model is your own.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"export: {path} is {metadata.get('format', 'something else')}, this reads {FORMAT}")
        about = json.loads(metadata["about"])
        if model is None:
            make: models.Model = config.part("model", _zoo(about["model"]), models.TABLE)
            with torch.random.fork_rng(devices=[]):
                model = make(tuple(about["shape"]), about["classes"])
        channels = {}
        for g in about["mask"]:
            group = Group(g["size"], tuple(Member(**m) for m in g["members"]))
            channels[group] = torch.arange(g["kept"])
        small = shrink(model, Mask(channels=channels)).eval()
        small.load_state_dict(load_file(path))
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"export: {path} is no model that was exported: {error}") from None
    return small


def _zoo(spec: Any) -> Any:
    """Reading a file runs nobody's code but ours."""
    if ":" in config.name(spec):
        raise ValueError(f"export: the model {config.name(spec)} is not of the zoo; give its skeleton")
    return spec


def _groups(mask: Mask) -> list[dict[str, Any]]:
    return [{**asdict(group), "kept": len(kept)} for group, kept in mask.channels.items()]


def _values(model: nn.Module) -> list[tuple[str, Tensor]]:
    return list(models.entries(model).items())


Outputs = Callable[[Tensor], Tensor]


def _pt2(small: nn.Module, x: Tensor, path: Path, about: Mapping[str, Any], model: nn.Module) -> Outputs:
    program = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _onnx(small: nn.Module, x: Tensor, path: Path, about: Mapping[str, Any], model: nn.Module) -> Outputs:
    if absent := [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]:
        raise ValueError(f"export: onnx needs {', '.join(absent)}: pip install 'prfl[onnx]'")
    from onnxruntime import InferenceSession

    torch.onnx.export(
        small, (x,), path, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=["input"],
        output_names=["logits"], external_data=False, verbose=False,
    )  # fmt: skip
    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"input": x.numpy()})[0])


def _safetensors(small: nn.Module, x: Tensor, path: Path, about: Mapping[str, Any], model: nn.Module) -> Outputs:
    from safetensors.torch import save

    tensors = {k: v.contiguous() for k, v in small.state_dict().items()}
    path.write_bytes(save(tensors, {"format": FORMAT, "about": json.dumps(about)}))
    return load(path, model)


WRITERS: dict[str, Callable[[nn.Module, Tensor, Path, Mapping[str, Any], nn.Module], Outputs]] = {
    "pt2": _pt2,
    "onnx": _onnx,
    "safetensors": _safetensors,
}
"""How a small model is written, and what it answers once loaded again."""
