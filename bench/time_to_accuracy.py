"""Virtual seconds to an accuracy: the experiments of a folder, several seeds each, with the spread.

    python bench/time_to_accuracy.py --data-dir DIR [--seeds 1 2 3] [--targets 0.9 0.95] [--out runs/time_to_accuracy]

Each run is one process on one thread. A run whose folder holds a summary is not repeated. Accuracy is that of the
validation split, at the first evaluation that reaches the target; the test split is reported once, at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).with_suffix("")


def run(path: Path, seed: int, folder: Path, data_dir: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """One run, or what it left: its summary and the seconds to every evaluation."""
    from prfl import config
    from sim.run import simulate

    if not (folder / "summary.json").exists():
        simulate(config.load(path, [f"seed={seed}", *overrides]), folder, data_dir=data_dir)
    events = [json.loads(line) for line in (folder / "events.jsonl").open()]
    curve = [(e["at"], e["validation_accuracy"]) for e in events if e["kind"] == "evaluation"]
    return {**json.loads((folder / "summary.json").read_text()), "curve": curve}


def reached(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """When the curve first reaches the target."""
    return next((at for at, accuracy in curve if accuracy >= target), None)


def shown(values: Sequence[float | None], digits: int = 1) -> str:
    """Mean and standard deviation, and how many of the runs they are of where not all."""
    known = [v for v in values if v is not None]
    if not known:
        return "never"
    spread = statistics.stdev(known) if len(known) > 1 else 0.0
    some = "" if len(known) == len(values) else f" ({len(known)}/{len(values)})"
    return f"{statistics.mean(known):.{digits}f} ± {spread:.{digits}f}{some}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=Path, default=HERE)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--targets", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--out", type=Path, default=Path("runs") / HERE.name)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="changes to all experiments")
    options = parser.parse_args()
    began, paths = time.perf_counter(), sorted(options.experiments.glob("*.yaml"))
    with ProcessPoolExecutor(options.processes) as pool:
        jobs = {
            (path.stem, seed): pool.submit(
                run, path, seed, options.out / f"{path.stem}-{seed}", options.data_dir, options.set
            )
            for seed in options.seeds
            for path in paths
        }
        results = {key: job.result() for key, job in jobs.items()}
    rows = []
    for path in paths:
        mine = [results[path.stem, seed] for seed in options.seeds]
        row: dict[str, Any] = {"experiment": path.stem, "seeds": options.seeds}
        for target in options.targets:
            row[f"seconds_to_{target:g}"] = [reached(r["curve"], target) for r in mine]
        for key in ("test_accuracy", "client_updates", "mean_density", "bytes_up", "bytes_down", "wall_seconds"):
            row[key] = [r[key] for r in mine]
        rows.append(row)
    heads = [f"s to {t:.0%}" for t in options.targets]
    print(
        "| experiment | " + " | ".join(heads) + " | test accuracy at the end | updates | mean density | MB down + up |"
    )
    print("| --- |" + " --- |" * (len(heads) + 4))
    for row in sorted(rows, key=lambda r: [v or 1e99 for v in r[f"seconds_to_{options.targets[-1]:g}"]]):
        traffic = [(d + u) / 1e6 for d, u in zip(row["bytes_down"], row["bytes_up"], strict=True)]
        cells = [
            *(shown(row[f"seconds_to_{t:g}"]) for t in options.targets),
            shown(row["test_accuracy"], 3),
            shown(row["client_updates"], 0),
            shown(row["mean_density"], 2),
            shown(traffic, 0),
        ]
        print(f"| {row['experiment']} | " + " | ".join(cells) + " |")
    wall = time.perf_counter() - began
    print(f"\n{len(results)} runs, {wall / 60:.1f} min of wall clock on {options.processes} processes")
    (options.out / "table.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
