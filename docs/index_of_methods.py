"""Write docs/methods/index.md, the table of all methods; run it after a change of `strategies/table.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from strategies import table

INDEX = Path(__file__).parent / "methods" / "index.md"
HEAD = """# Methods

Generated from `strategies/table.py` by `python docs/index_of_methods.py`; `prfl methods` prints the same. Every page
has a short run and what it printed. Parts: density, saliency, merge, cut, remask.

| method | what it does | usual pacing | parts | paper |
| --- | --- | --- | --- | --- |
"""


def index() -> str:
    """The text of the index."""
    rows = []
    for name, row in sorted(table.METHODS.items()):
        first = (sys.modules[row.make.__module__].__doc__ or "").strip().splitlines()[0]
        what = first.partition("): ")[2] or first.partition(": ")[2] or first
        parts = ", ".join(table.described(row.make()))
        rows.append(f"| [{name}]({name}.md) | {what} | `{row.pacing}` | {parts} | {row.paper} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    INDEX.write_text(index())
