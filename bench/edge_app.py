"""The ServerApp of `edge.py`: tasks one after the other, to one node."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def server(grid: Grid, context: Context) -> None:
    """Tasks one after the other, the first one to warm up; when each was sent and came, and its seconds of training."""
    from clients.local import Local
    from deploy.replies import Prompt
    from prfl import groups, models, problem
    from prfl.codec import Codec, Layout
    from prfl.config import Experiment
    from prfl.masks import DENSE
    from prfl.records import architecture_out, experiment_out
    from prfl.types import Task, Work
    from strategies.grid import GridTransport

    chosen = context.run_config
    experiment = Experiment.model_validate(
        {
            "data": {"set": "digits", "clients": 2, "partition": "iid"},
            "model": {"name": "mlp", "hidden": json.loads(str(chosen["hidden"]))},
            "work": {"steps": 1, "batch": 10, "lr": 0.1},
        }
    )
    given = problem.build(experiment)
    local, params = Local(given), models.values(given.model)
    architecture = groups.architecture(given.model, given.example)
    beside = {
        "experiment": experiment_out(experiment),
        "codec": json.dumps(asdict(Codec())),
        "architecture": architecture_out(architecture),
    }
    layout = Layout.of(params, architecture.groups)
    transport = GridTransport(Prompt(grid), Codec(), layout, beside, timeout=300)
    transport.enrol(1)
    rows: list[dict[str, Any]] = []
    for version in range(int(chosen["tasks"]) + 1):
        task = Task(0, version, params, DENSE, Work(steps=1, batch=10, lr=0.1), seed=version)
        began, sent = time.time(), transport.now()
        transport.send(task)
        arrival = transport.wait()
        if arrival is None or arrival.update is None:
            raise RuntimeError(f"no update: {arrival}")
        ended, took = time.time(), transport.now() - sent
        start = time.perf_counter()
        local.train(task)  # as long as it took on the node, which is this machine too
        training = time.perf_counter() - start
        rows.append(
            {
                "began": began,
                "ended": ended,
                "seconds": took - training,
                "training": training,
                "encoded_down": arrival.bytes_down,
                "encoded_up": arrival.bytes_up,
            }
        )
        time.sleep(0.5)
    out = Path(str(chosen["out"]))
    out.with_suffix(".part").write_text(json.dumps(rows[1:]))
    out.with_suffix(".part").rename(out)
