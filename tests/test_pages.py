"""Pages whose files and commands are all that a reader needs: they are written and run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
NAMED = re.compile(r"# (\S+\.(?:py|yaml))\n")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and content of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "left"),
    [
        ("adding-a-method.md", ["slim", "slimmer", "turns", "compared/turns-turns/seed-2"]),
        ("comparing.md", ["mine-compare/fedavg/seed-3", "usual/pr_fl/seed-2", "one", "found/fedbuff/seed-2", "told"]),
    ],
)
def test_a_page_is_true(page: str, left: list[str], tmp_path: Path) -> None:
    found = blocks(DOCS / page)
    scripts = Path(sys.executable).parent
    if not shutil.which("prfl", path=str(scripts)):
        pytest.skip(f"no prfl in {scripts}: the package is not installed there")
    for language, content in found:
        if language in ("python", "yaml"):
            name = NAMED.match(content)
            assert name, f"a block of {page} has no file name in its first line"
            (tmp_path / name[1]).write_text(content, encoding="utf-8")
    commands = "".join(content for language, content in found if language == "sh")
    settings = {"PATH": f"{scripts}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    shell = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=tmp_path, env={**os.environ, **settings}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900,
    )  # fmt: skip
    assert shell.returncode == 0, shell.stdout[-3000:]
    for run in left:
        assert (tmp_path / "runs" / run / "summary.json").is_file()
