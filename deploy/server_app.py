"""The Flower ServerApp of real devices."""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from deploy.run import federate
from prfl.records import experiment_in

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment of the run config. `experiment`: as JSON; `folder`: the run folder; `data-dir`: or empty."""
    logging.getLogger("prfl").setLevel(logging.INFO)
    chosen = context.run_config
    folder, data_dir = Path(str(chosen["folder"])), str(chosen["data-dir"])
    experiment = experiment_in(str(chosen["experiment"]))
    result = federate(grid, experiment, folder, Path(data_dir) if data_dir else None)
    print(f"{folder}: test accuracy {result['test_accuracy']:.4f}, model {result['model_sha256']}", flush=True)
    if result["stopped"]:
        raise RuntimeError(f"{result['stopped']}; {folder} is complete up to version {result['versions']}")
