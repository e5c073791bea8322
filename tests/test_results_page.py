"""The page of results: its commands compare what it says, and its files are there and small."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

from prfl import config
from sim import compare

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "results" / "README.md").read_text(encoding="utf-8")
TWELVE = {"pr_fl", "fedgmr", "fedavg", "fedasync", "fedbuff", "fedfix", "heterofl", "fedmp", "autoflip", "feddst",
          "prunefl", "fjord"}  # fmt: skip


def commands() -> list[list[str]]:
    """The arguments of every `prfl` on the page."""
    (content,) = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S)
    methods = re.search(r"METHODS='(.*?)'", content, re.S)
    assert methods
    lines = content.replace(methods[0], "").replace("\\\n", " ").strip().splitlines()
    return [shlex.split(line.replace("$METHODS", methods[1]))[1:] for line in lines]


def test_the_commands_compare_the_twelve_methods(tmp_path: Path) -> None:
    asked = commands()
    assert [words[0] for words in asked] == ["compare", "compare"]
    for words in asked:
        given = dict(pairwise(words))
        experiment = config.load(DOCS.parent / words[1])
        seeds = [int(seed) for seed in given["--seeds"].split(",")]
        usual = "--usual-pacing" in words
        found = compare.jobs(experiment, compare.specs(given["--methods"]), seeds, tmp_path / experiment.name, usual)
        assert {job.label for job in found} == TWELVE
        assert len(found) == 36
        assert len({str(job.experiment.stop) + str(job.experiment.data) for job in found}) == 1


def test_what_the_page_shows_is_there_and_small() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", PAGE)
    assert len(links) >= 6
    for link in links:
        assert (DOCS / "results" / link).is_file(), link
    assert all(path.stat().st_size < 200_000 for path in (DOCS / "results").rglob("*") if path.is_file())
