"""The pages of the methods: one for each, commands that are experiments, an index that lists them all."""

from __future__ import annotations

import re
import shlex
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from prfl import config
from sim import experiments
from strategies import parts, table

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(p.stem for p in (DOCS / "methods").glob("*.md") if p.stem != "index")


def commands(text: str) -> list[list[str]]:
    """The arguments of every `prfl run` in a block of code; a backslash goes on with the line."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line.removeprefix(".venv/bin/")) for line in lines if "prfl run " in line]
    return [w[2:] for w in words if w[:2] == ["prfl", "run"]]


def experiment(arguments: list[str]) -> config.Experiment:
    """What `prfl run` makes of its arguments; options with a value are left out."""
    kept, rest = [], iter(arguments)
    for word in rest:
        if word.startswith("--"):
            next(rest)
        else:
            kept.append(word)
    return config.load(*experiments.chosen(kept))


@pytest.mark.parametrize("name", sorted(table.METHODS))
def test_every_method_has_a_page_with_a_command_that_is_an_experiment_with_it(name: str) -> None:
    page = DOCS / "methods" / f"{name}.md"
    assert page.exists(), f"docs/methods/{name}.md is missing"
    found = commands(page.read_text())
    assert found
    used = set()
    for arguments in found:
        made = experiment(arguments)
        parts.of(made)
        used.add(config.name(made.method))
    assert name in used


@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_a_method_s_with_its_paper(name: str) -> None:
    text = " ".join((DOCS / "methods" / f"{name}.md").read_text().split())
    assert name in table.METHODS
    assert text.startswith("# ")
    for author in re.findall(r"([A-Z]\w+)(?: et al\.|,)", table.METHODS[name].paper)[:1]:
        assert author in text


def test_the_index_lists_all_and_is_as_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_from_file_location("index_of_methods", DOCS / "index_of_methods.py")
    assert spec is not None
    assert spec.loader is not None
    made = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "index_of_methods", made)
    spec.loader.exec_module(made)
    text = (DOCS / "methods" / "index.md").read_text()
    assert all(f"[{name}]({name}.md)" in text for name in table.METHODS)
    assert text == made.index(), "run python docs/index_of_methods.py"


def test_commands_are_found() -> None:
    text = (
        "```\nprfl run a=1 \\\n  'b={c: d}' --workers serial\n```\n`prfl run x`\n```sh\n.venv/bin/prfl run y\nls\n```\n"
    )
    assert commands(text) == [["a=1", "b={c: d}", "--workers", "serial"], ["y"]]
