"""A report as a value: words, tables and figures, written as a page and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prfl import page
from prfl.figures import legend, sheet


@dataclass(frozen=True)
class Table:
    """Plain text; the first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """`panels`: SVG. `legend`: whether the document's colours are told with it.

    picture: its name in a file of its own beside the Markdown, which shows it; only for panels of `figures.lines`.
    """

    panels: Sequence[str]
    caption: str
    legend: bool = True
    picture: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[str | Table | Figure]


@dataclass(frozen=True)
class Document:
    """`colours`: names and numbers of what is told apart by colour; no legend for a single one."""

    title: str
    lead: str
    warnings: Sequence[str]
    sections: Sequence[Section]
    colours: Mapping[str, int]

    def html(self) -> str:
        """A page that is whole by itself."""
        key = legend(self.colours) if len(self.colours) > 1 else ""
        body = [page.heading(self.title, 1), page.paragraph(self.lead, "lead")]
        body += [page.paragraph(text, "warn") for text in self.warnings]
        for section in self.sections:
            body.append(page.heading(section.title))
            for block in section.blocks:
                if isinstance(block, Table):
                    body.append(page.table(block.head, block.rows, block.note))
                elif isinstance(block, Figure):
                    body.append(page.figure(block.panels, block.caption, key if block.legend else ""))
                else:
                    body.append(page.paragraph(block))
        return page.page(self.title, body)

    def pictures(self) -> dict[str, str]:
        """The figures that have a picture, by its name: SVG."""
        figures = [b for section in self.sections for b in section.blocks if isinstance(b, Figure) and b.picture]
        names = self.colours if len(self.colours) > 1 else {}
        return {b.picture: sheet(b.panels, names, page.style()) for b in figures}

    def markdown(self, beside: str = "report") -> str:
        """Words and tables; of the figures what they show, or their picture. `beside`: how names of pictures begin."""
        out = [f"# {_plain(self.title)}", _plain(self.lead), *(f"**{_plain(text)}**" for text in self.warnings)]
        for section in self.sections:
            out.append(f"## {_plain(section.title)}")
            for block in section.blocks:
                if isinstance(block, Table):
                    rows = [block.head, ["---"] * len(block.head), *block.rows]
                    out.append("\n".join(f"| {' | '.join(map(_plain, row))} |" for row in rows))
                    out += [_plain(block.note)] if block.note else []
                elif isinstance(block, Figure) and block.picture:
                    out += [f"![{_plain(section.title)}]({beside}-{block.picture}.svg)", _plain(block.caption)]
                elif isinstance(block, Figure):
                    out.append(f"*In the HTML page:* {_plain(block.caption)}")
                else:
                    out.append(_plain(block))
        return "\n\n".join(out) + "\n"

    def write(self, file: Path) -> Path:
        """The page, and the same as Markdown beside it, whose path comes back, with its pictures."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.html(), encoding="utf-8")
        for name, picture in self.pictures().items():
            file.with_name(f"{file.stem}-{name}.svg").write_text(picture, encoding="utf-8")
        beside = file.with_suffix(".md")
        beside.write_text(self.markdown(file.stem), encoding="utf-8")
        return beside


def _plain(text: str) -> str:
    """Text that is no Markdown, where it may stand in a table."""
    for mark in "\\`*_|<":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
