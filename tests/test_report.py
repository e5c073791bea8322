"""Reports: sums checked by hand, text that is only text, and a page that a browser shows whole and by itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html.parser import HTMLParser
from io import StringIO
from itertools import count
from math import isclose
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from prfl import config, energy, evaluate, fairness, figures, live, problem, report, store, traces
from prfl.config import ConfigError
from prfl.document import Table
from prfl.energy import Watts
from prfl.samples import Samples
from prfl.tally import Tally
from sim import experiments
from sim.devices import load
from sim.run import simulate

SMALL = ["data.clients=8", "model={name: mlp, hidden: [16]}", "pacing={name: buffered, in_flight: 5, goal: 3}",
         "work={steps: 3}", "stop={versions: 6}", "evaluate_every=2"]  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two seeds."""
    home = tmp_path_factory.mktemp("ran")
    for method, seed in (("fedbuff", 1), ("fedbuff", 2), ("{name: pr_fl, every: 2, floor: 0.3}", 1)):
        experiment = config.load(experiments.path("default"), [*SMALL, f"method={method}", f"seed={seed}"])
        simulate(experiment, home / config.name(experiment.method) / f"seed-{seed}")
    return home


def test_energy_by_hand() -> None:
    watts = {"board": Watts(1.0, 10.0, 4.0)}
    found = energy.by_class({0: "board", 1: "board", 2: "other"}, {0: 3.0, 2: 5.0}, {0: 2.0}, 20.0, watts)
    assert found == {"board": {"busy": 30.0, "radio": 8.0, "idle": 15.0 + 20.0}}


def test_the_energy_of_a_run_is_that_of_its_events(ran: Path) -> None:
    folder = ran / "fedbuff" / "seed-1"
    summary, rows = store.summary(folder), store.clients(folder)
    arrivals = [e for e in store.events(folder) if e["kind"] == "arrival"]
    profiles = load(yaml.safe_load((folder / "config.yaml").read_text())["devices"]["profiles"])
    for e in arrivals:
        assert isclose(e["busy"] + e["radio"], e["seconds"], rel_tol=1e-9)
        assert min(e["busy"], e["radio"]) > 0
    for name, found in summary["joules"].items():
        watts, own = profiles[name].watts, [e for e in arrivals if rows[e["client"]]["class"] == name]
        assert watts is not None
        clients = sum(row["class"] == name for row in rows.values())
        busy, radio = (sum(e[k] for e in own) for k in ("busy", "radio"))
        assert found["busy"] == pytest.approx(busy * watts.busy)
        assert found["radio"] == pytest.approx(radio * watts.radio)
        assert found["idle"] == pytest.approx((clients * summary["virtual_seconds"] - busy - radio) * watts.idle)
    assert set(summary["joules"]) == {row["class"] for row in rows.values()}


def test_devices_without_watts_have_no_energy(tmp_path: Path) -> None:
    fleet = "devices.fleet={name: links, down: [1, 2], up: [1, 1], clients: 8}"
    result = simulate(config.load(experiments.path("default"), [*SMALL, fleet]), tmp_path / "run")
    assert "joules" not in result
    assert {p.joules for p in traces.read(tmp_path / "run").points[1:]} == {None}
    assert "energy at work" not in report.single(traces.read(tmp_path / "run")).html()
    (tmp_path / "own.yaml").write_text(
        "link0: {watts: {idle: 1, busy: 5, radio: 2}}\nlink1: {watts: {idle: 1, busy: 5, radio: 2}}"
    )
    told = traces.read(tmp_path / "run", traces.powers(tmp_path / "own.yaml"))
    assert told.points[-1].joules > 0  # type: ignore[operator]


@pytest.mark.parametrize(
    ("text", "said"),
    [("- 1", "no device profiles"), ("a: {watts: {idle: x, busy: 1, radio: 1}}", "watts: idle"), (":", "no device")],
)
def test_profiles_that_are_none_are_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        traces.powers(tmp_path / "own.yaml")


def test_fairness_by_hand() -> None:
    assert fairness.jain([1, 1, 1, 1]) == 1.0
    assert fairness.jain([1, 0, 0, 0]) == 0.25
    assert fairness.jain([1, 3]) == 0.8
    assert fairness.jain([0, 0]) == 1.0
    assert fairness.worst([0.5, 0.1, 0.3, *[1.0] * 17]) == pytest.approx(0.2)
    assert fairness.worst([0.4]) == 0.4
    clients = {
        0: {"class": "a", "updates": 2, "samples": 30.0, "accuracy": 0.9},
        1: {"class": "b", "updates": 1, "samples": 10.0, "accuracy": 0.5},
        2: {"class": "b", "updates": 0, "samples": 10.0, "accuracy": 0.3},
        3: {"class": "b", "updates": 0},
    }
    found = fairness.local(clients, 0.75)
    assert found["worst_tenth"] == 0.3
    assert found["by_class"] == {"a": 0.9, "b": 0.4}
    assert found["participants"] == {"clients": 2, "accuracy": 0.7}
    assert found["others"] == {"clients": 1, "accuracy": 0.3}
    assert found["generalisation_gap"] == pytest.approx((27 + 5) / 40 - 0.75)


def test_macro_scores_by_hand() -> None:
    y = torch.tensor([0, 0, 0, 1, 1, 2])
    said = torch.tensor([0, 0, 1, 1, 0, 0])  # class 2 is never predicted
    samples = Samples(torch.nn.functional.one_hot(said, 3).float().reshape(6, 3, 1, 1), y)
    found = evaluate.score(nn.Flatten(), samples, batch=4, macro=True)
    assert found["precision"] == pytest.approx((2 / 4 + 1 / 2 + 0) / 3)
    assert found["recall"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found["f1"] == pytest.approx((2 * 0.5 * (2 / 3) / (0.5 + 2 / 3) + 0.5 + 0) / 3)
    assert found["accuracy"] == 0.5


def test_the_clients_are_scored_on_what_they_train_on(ran: Path) -> None:
    from safetensors.torch import load_file

    folder = ran / "pr_fl" / "seed-1"
    given, params = problem.build(config.load(folder / "config.yaml")), load_file(folder / "model.safetensors")
    rows = store.clients(folder)
    for client, row in rows.items():
        own = evaluate.evaluate(params, given.model, given.samples(client))
        assert {k: row[k] for k in own} == own
    used = {
        c: sum(e["used"] for e in store.events(folder) if e["kind"] == "arrival" and e["client"] == c) for c in rows
    }
    assert used == {c: row["updates"] for c, row in rows.items()}


def test_personal_models_are_in_the_report(tmp_path: Path) -> None:
    changes = [*SMALL, "method={name: sub_fedavg, accuracy: 0.0}", "pacing={name: sync, clients: 4}"]
    found = simulate(config.load(experiments.path("default"), changes), tmp_path)
    last = {e["client"]: e["held_out"] for e in store.events(tmp_path) if e["kind"] == "arrival" and e["used"]}
    rows = store.clients(tmp_path)
    assert {c: row["personal"] for c, row in rows.items() if "personal" in row} == last
    assert found["personal"] == {"clients": len(last), "accuracy": fmean(last.values()),
                                 "worst_tenth": min(last.values())}  # fmt: skip
    page = report.single(traces.read(tmp_path)).markdown()
    assert f" | {fmean(last.values()):.3f} | {min(last.values()):.3f} |" in page
    assert "it does not train on" in page


def test_the_covering_index_of_every_run_is_in_the_report(ran: Path) -> None:
    groups = traces.grouped([traces.read(f) for f in traces.expand([ran])])
    table = next(s for s in report.make(groups, "x").sections if s.title == "Runs").blocks[-1]
    assert isinstance(table, Table)
    rows = {(row[0], row[1]): dict(zip(table.head, row, strict=True)) for row in table.rows}
    for label, group in groups.items():
        for t in group:
            merges = [e["covering"] for e in store.events(t.folder) if e["kind"] == "merge"]
            row = rows[label, str(t.seed)]
            assert row["covering, least"] == str(min(merges))
            assert row["covering, mean"] == f"{fmean(merges):.1f}"


def test_evaluations_can_be_seconds_apart(tmp_path: Path) -> None:
    changes = [*SMALL, "evaluate_every=1", "stop={versions: 12}"]
    for name, more in (("all", []), ("some", ["evaluate_after=0.5"])):
        simulate(config.load(experiments.path("default"), [*changes, *more]), tmp_path / name)
    every, some = (
        [e["at"] for e in store.events(tmp_path / name) if e["kind"] == "evaluation"] for name in ("all", "some")
    )
    due: list[float] = []
    for at in every:
        due += [at] if not due or at - due[-1] >= 0.5 else []
    assert some == due
    assert 2 < len(some) < len(every)


def test_metrics_are_asked_for(tmp_path: Path) -> None:
    bare = simulate(config.load(experiments.path("default"), [*SMALL, "metrics=[]", "stop.versions=1"]), tmp_path)
    assert not {"test_f1", "local"} & set(bare)
    assert "accuracy" not in store.clients(tmp_path)[0]
    with pytest.raises(ConfigError, match="metrics"):
        config.load(None, ["metrics=[locl]"])


EVENTS = (
    {"kind": "evaluation", "at": 0.0, "version": 0, "validation_accuracy": 0.1},
    {"kind": "send", "at": 0.0, "client": 0, "version": 0, "density": 0.5},
    {"kind": "arrival", "at": 4.0, "client": 0, "version": 0, "staleness": 0, "seconds": 4.0, "density": 0.5,
     "bytes_down": 10, "bytes_up": 5, "used": True, "reason": "", "busy": 3.0, "radio": 1.0},
    {"kind": "merge", "at": 4.0, "version": 1, "updates": 1, "coverage": 0.5},
    {"kind": "evaluation", "at": 4.0, "version": 1, "validation_accuracy": 0.7},
    {"kind": "resume", "at": 5.0, "version": 1, "asked": [1], "updates": 1, "bytes_down": 7, "bytes_up": 0},
    {"kind": "evaluation", "at": 9.0, "version": 2, "validation_accuracy": 0.6},
)  # fmt: skip


def written(folder: Path, device: str = "board", **more: Any) -> Path:
    """A run folder by hand."""
    experiment = config.Experiment.model_validate(
        {"devices": {"profiles": {device: {"watts": {"idle": 1, "busy": 2, "radio": 3}}}}, **more}
    )
    run = store.Run(folder, experiment)
    for event in EVENTS:
        run.log(event)
    run.write("clients.json", {"0": {"class": device, "updates": 1}, "1": {"class": device, "updates": 0}})
    run.write("summary.json", {"virtual_seconds": 9.0, "wall_seconds": 1.0, "test_accuracy": 0.65, "bytes_up": 5,
                               "bytes_down": 17,
                               "best_validation_accuracy": 0.7, "client_updates": 1, "mean_density": 0.5, "versions": 2,
                               "stopped": None, "interrupted": False, "model_sha256": "0" * 64})  # fmt: skip
    run.close()
    return folder


def test_a_trace_by_hand(tmp_path: Path) -> None:
    trace = traces.read(written(tmp_path))
    assert [(p.version, p.seconds, p.bytes, p.joules) for p in trace.points] == [
        (0, 0.0, 0.0, 0.0), (1, 4.0, 15.0, 9.0), (2, 9.0, 22.0, 9.0)
    ]  # fmt: skip
    assert [(s.client, s.start, s.end, s.used) for s in trace.spans] == [(0, 0.0, 4.0, True)]
    assert trace.coverage == [(4.0, 0.5)]
    assert trace.first(0.65) == trace.points[1]
    assert trace.first(0.8) is None
    assert trace.best == 0.7


def test_a_run_without_what_is_new_is_read_all_the_same(tmp_path: Path) -> None:
    folder = written(tmp_path)
    (folder / "clients.json").unlink()
    log = (folder / "events.jsonl").read_text()
    (folder / "events.jsonl").write_text(log.replace(',"busy":3.0,"radio":1.0', "").replace(',"coverage":0.5', ""))
    trace = traces.read(folder)
    assert trace.clients == {0: {"class": "unknown", "updates": 1}}
    assert (trace.points[1].joules, trace.coverage) == (None, [])
    assert "0.65" in report.single(trace).markdown()


@pytest.mark.parametrize("lost", ["summary.json", "events.jsonl"])
def test_a_run_that_is_not_whole_is_one_line(tmp_path: Path, lost: str) -> None:
    (written(tmp_path) / lost).unlink()
    with pytest.raises(ConfigError, match="holds no"):
        traces.read(tmp_path)


def test_a_cost_in_the_table_is_that_of_the_runs(ran: Path) -> None:
    groups = traces.grouped([traces.read(f) for f in traces.expand([ran])])
    assert {k: [t.seed for t in v] for k, v in groups.items()} == {"fedbuff": [1, 2], "pr_fl": [1]}
    target = min(t.best for t in groups["fedbuff"])
    page = report.make(groups, "x", [target])
    seconds = [t.first(target).seconds for t in groups["fedbuff"]]  # type: ignore[union-attr]
    mean, deviation = np.mean(seconds), np.std(seconds, ddof=1)
    assert f"time, fedbuff | {mean:.1f} ± {deviation:.1f} s |" in page.markdown()
    assert "Not every method has the same seeds (fedbuff: 1, 2; pr_fl: 1)." in page.html()
    assert all(0 < t < 1 for t in report.chosen(groups))


def test_what_is_not_alike_is_said(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a"), written(tmp_path / "b", method="fedavg", data={"clients": 7})
    groups = traces.grouped([traces.read(a), traces.read(b)])
    assert "also in: data." in report.make(groups, "x").html()
    same = traces.grouped([traces.read(a), traces.read(written(tmp_path / "c", method="fedavg"))])
    assert "also in" not in report.make(same, "x").html()


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_names_from_outside_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=y>"
    trace = traces.read(written(tmp_path, evil))
    made = report.make({evil: [trace], "other": [trace]}, evil, warnings=[evil])
    tags = _Tags()
    tags.feed(made.html())
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in tags.seen}
    assert not [key for _, attributes in tags.seen for key in attributes if key.startswith("on") or key == "src"]
    assert "<script" not in made.markdown().replace("\\<", "")
    for svg in made.html().split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.partition("</svg>")[0] + "</svg>")


def test_a_page_names_no_address(ran: Path) -> None:
    html = report.single(traces.read(ran / "pr_fl" / "seed-1")).html()
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in html
    assert "default-src 'none'" in html


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e9))
def test_ticks_are_few_and_hold_everything(low: float, span: float) -> None:
    found = figures.ticks(low, low + span)
    slack = 1e-6 * (abs(low) + span)
    assert found[0] <= low + slack
    assert found[-1] >= low + span - slack
    assert 2 <= len(found) <= 13


def test_units_by_hand() -> None:
    assert figures.unit("seconds", 90) == (1.0, "s")
    assert figures.unit("seconds", 600) == (60.0, "min")
    assert figures.unit("bytes", 5e6) == (1e6, "MB")
    assert figures.unit("joules", 5e9) == (1e6, "MJ")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def browser(home: Path) -> Iterator[str]:
    """A headless Chromium; the address of its DevTools."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={home}"]  # fmt: skip
    process = subprocess.Popen(
        [str(CHROMIUM), *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            port = home / "DevToolsActivePort"
            if port.exists() and len(lines := port.read_text().splitlines()) == 2:
                yield f"127.0.0.1:{lines[0]}"
                return
            assert process.poll() is None
            time.sleep(0.1)
        pytest.fail("Chromium does not start")
    finally:
        process.terminate()
        process.wait(20)


class Tab:
    """A tab over the DevTools protocol, with all that happened in it."""

    def __init__(self, address: str):
        from websockets.sync.client import connect

        made = urllib.request.Request(f"http://{address}/json/new?about:blank", method="PUT")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(made) as answer:
            target = json.load(answer)["webSocketDebuggerUrl"]
        self._socket, self._ids = connect(target, proxy=None, max_size=None), count(1)
        self.events: list[Mapping[str, Any]] = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (heard := json.loads(self._socket.recv(timeout=60))).get("id") != number:
            self.events.append(heard)
        assert "error" not in heard, heard
        return heard["result"]

    def open(self, page: Path) -> None:
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(json.loads(self._socket.recv(timeout=60)))
        self.value("new Promise(done => setTimeout(done, 300))")

    def value(self, code: str) -> Any:
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        return found["result"].get("value")

    def requests(self) -> list[str]:
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith(("data:", "about:"))]

    def errors(self) -> list[Any]:
        names = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        return [e["params"] for e in self.events if e["method"] in names]

    def close(self) -> None:
        self._socket.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH; install it to see reports in a browser")
def test_a_browser_shows_the_whole_page_and_loads_nothing(ran: Path, tmp_path: Path) -> None:
    page, bad = tmp_path / "report.html", tmp_path / "bad.html"
    groups = traces.grouped([traces.read(f) for f in traces.expand([ran])])
    made = report.make(groups, "two methods")
    made.write(page)
    bad.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('x')</script>")
    with browser(tmp_path / "profile") as address:
        tab = Tab(address)
        try:
            tab.open(bad)  # what the test looks for can be seen
            assert "http://127.0.0.1:9/x.png" in tab.requests()
            assert tab.errors()
            tab.open(page)
            tab.value("BOX = e => [e.getBoundingClientRect().width, e.getBoundingClientRect().height]; 0")
            assert tab.requests() == [page.as_uri()]
            assert tab.errors() == []
            for width, scheme in ((1200, "light"), (360, "dark")):
                tab.call(
                    "Emulation.setDeviceMetricsOverride",
                    width=width,
                    height=800,
                    deviceScaleFactor=1,
                    mobile=width < 500,
                )
                tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                sizes = tab.value("[...document.querySelectorAll('svg.figure')].map(BOX)")
                assert len(sizes) == made.html().count('class="figure"') >= 20
                assert all(200 <= w <= width and h > 50 for w, h in sizes)
                text = tab.value(
                    "Math.min(...[...document.querySelectorAll('svg.figure text')].map(BOX).map(b => b[1]))"
                )
                assert text >= 9
                assert tab.value("document.documentElement.scrollWidth") <= width
                ground = tab.value("getComputedStyle(document.body).backgroundColor")
                assert (max(map(int, ground.removeprefix("rgb(").removesuffix(")").split(", "))) < 80) == (
                    scheme == "dark"
                )
                drawn = tab.value(
                    "[...document.querySelectorAll('polyline.line')].map(l => getComputedStyle(l).stroke)"
                )
                assert len(set(drawn)) == 2
                assert "none" not in drawn
        finally:
            tab.close()


def test_the_name_of_a_class_is_no_markup() -> None:
    """A node says what its class is called."""
    tally = Tally({0: "[/x]"}, False)
    tally({"kind": "send", "client": 0, "version": 0, "density": 0.5, "at": 0.0})
    console = Console(force_terminal=True, width=100, file=StringIO())
    console.print(live._picture("title", tally, 3, 1.0))
    assert "[/x]" in console.file.getvalue()  # type: ignore[attr-defined]
