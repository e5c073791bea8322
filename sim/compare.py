"""Methods side by side: every method with every seed, each run in a folder of its own, on one pool of workers."""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from prfl import config, problem, store
from prfl.config import ConfigError, Experiment, Spec
from prfl.live import duration
from prfl.problem import Problem
from prfl.specs import explain
from sim import plan
from sim.pools import Pool
from sim.run import simulate
from strategies import pacing as pacings
from strategies import parts, table
from strategies.pacing import Pacing


@dataclass(frozen=True)
class Job:
    """One run of a comparison. `label`: its method; runs with the same label differ in their seed only."""

    label: str
    experiment: Experiment
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its summary, or the one-line reason why there is none. `found`: it had been run before."""

    job: Job
    summary: dict[str, Any] | None
    reason: str = ""
    found: bool = False

    def __str__(self) -> str:
        title = f"{self.job.label}, seed {self.job.experiment.seed}: "
        if self.summary is None:
            return f"{title}failed: {self.reason}"
        s, when = self.summary, "was there" if self.found else f"in {duration(self.summary['wall_seconds'])}"
        early = f", stopped early: {s['stopped']}" if s["stopped"] else ""
        time = duration(s["virtual_seconds"])
        return f"{title}test accuracy {s['test_accuracy']:.4f}, {time} virtual{early}; {when}"


def specs(text: str) -> list[Spec]:
    """Methods as a command line has them, `fedavg,{name: pr_fl, floor: 0.2}`. Raises ConfigError."""
    try:
        found = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        found = None
    if not found or not all(isinstance(spec, str | dict) for spec in found):
        raise ConfigError(f"methods: names with commas between are wanted, as in fedavg,pr_fl; got {text!r}")
    return list(found)


def place(experiment: Experiment, out: Path | None) -> Path:
    """The folder of a comparison; the same experiment has the same one, to go on in."""
    return Path("runs") / f"{experiment.name}-compare" if out is None else out


def jobs(
    experiment: Experiment, methods: Sequence[Spec], seeds: Sequence[int], out: Path, usual: bool = False
) -> list[Job]:
    """What there is to run, seed by seed. A bare name that is the experiment's method has the experiment's options.

    Every method runs in the experiment's pacing; `usual`: in the one that its paper runs it in, with as many clients
    at work. Raises ConfigError for all that can be checked without data, and where `out` holds another comparison.
    """
    if not methods or not seeds:
        raise ConfigError("a comparison needs a method and a seed at least")
    if twice := [str(x) for i, x in enumerate([*methods, *seeds]) if x in [*methods, *seeds][:i]]:
        raise ConfigError(f"{twice[0]} is named twice")
    own = config.name(experiment.method)
    chosen = [experiment.method if spec == own else spec for spec in methods]
    found = []
    for seed in seeds:
        for label, method in zip(_labels(chosen), chosen, strict=True):
            changed = {"method": method, "seed": seed}
            if usual:
                changed["pacing"] = usual_pacing(method, experiment)
            job = Job(label, _checked(experiment.model_copy(update=changed)), out / label / f"seed-{seed}")
            plan.of(job.experiment)
            if (job.folder / "config.yaml").exists() and not same(job):
                raise ConfigError(f"{job.folder} holds a run of another experiment; choose another --out")
            found.append(job)
    return found


def run(todo: Sequence[Job], pool: Pool, data_dir: Path | None = None) -> Iterator[Outcome]:
    """Run what has not been run, one job after the other, and tell how each ended; a failed one stops no other.

    What was broken off is run again from its start. Data is loaded once a seed. Ends early at Ctrl-C.
    """
    given: tuple[int, Problem] | None = None
    for job in todo:
        if done(job.folder):
            yield Outcome(job, store.summary(job.folder), found=True)
            continue
        try:
            if given is None or given[0] != job.experiment.seed:
                given = job.experiment.seed, problem.build(job.experiment, data_dir)
            if (job.folder / "events.jsonl").exists():
                with store.alone(job.folder):
                    shutil.rmtree(job.folder)
            result = simulate(job.experiment, job.folder, pool=pool, data_dir=data_dir, given=given[1])
        except Exception as error:  # whatever a method does, the others go on
            yield Outcome(job, None, " ".join(str(error).split()) or type(error).__name__)
            continue
        if result["interrupted"]:
            raise KeyboardInterrupt
        yield Outcome(job, result)


def done(folder: Path) -> bool:
    """Whether a run has come to its end here, and was not interrupted."""
    return (folder / "summary.json").is_file() and not store.summary(folder)["interrupted"]


def same(job: Job) -> bool:
    """Whether the run in the job's folder is the job's."""
    there = yaml.safe_load((job.folder / "config.yaml").read_text(encoding="utf-8"))
    wanted: Any = config.plain(plan.spelled(job.experiment).model_dump())
    return bool(there == yaml.safe_load(yaml.safe_dump(wanted)))


def usual_pacing(method: Spec, experiment: Experiment) -> Spec:
    """The pacing that the method's paper runs it in, with the experiment's clients at work, goal and deadline.

    A method that is not in the table keeps the experiment's. ConfigError: the usual one needs what this one lacks.
    """
    row = table.METHODS.get(config.name(method))
    if row is None or row.pacing == config.name(experiment.pacing):
        return experiment.pacing
    now: Pacing = parts.of(experiment).pacing
    known = {field.name: getattr(now, field.name) for field in fields(now)}
    known |= {"clients": now.in_flight, "seconds": now.deadline}
    wanted = inspect.signature(pacings.TABLE[row.pacing]).parameters
    absent = [k for k, p in wanted.items() if p.default is p.empty and not isfinite(known[k])]
    if absent:
        raise ConfigError(
            f"{config.name(method)}: its usual pacing, {row.pacing}, needs {absent[0]}, which the experiment's does "
            "not tell; give all, as in pacing={name: pacing, in_flight: 20, goal: 5, deadline: 2.5}"
        )
    taken = [k for k, p in wanted.items() if p.default is p.empty or (k == "max_staleness" and isfinite(known[k]))]
    return {"name": row.pacing, **{k: known[k] for k in taken}}


def _labels(methods: Sequence[Spec]) -> list[str]:
    """A name for every method that is a folder's too; the second of a name is name-2."""
    names = [re.sub(r"[^\w.-]+", "-", config.name(spec)).strip(".-") or "method" for spec in methods]
    return [name if (n := names[: i + 1].count(name)) == 1 else f"{name}-{n}" for i, name in enumerate(names)]


def _checked(experiment: Experiment) -> Experiment:
    try:
        return Experiment.model_validate(experiment.model_dump())
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
