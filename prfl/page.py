"""One HTML file that is whole by itself: its style is in it, and its policy forbids to load anything."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b8528c", "#c98a00", "#3a9bd9", "#6b4fa0", "#5c5c5c")
DARK = ("#5cb3ec", "#ff8a4c", "#35c99a", "#e68fc0", "#f0b93a", "#9fd6ff", "#b39ddb", "#bdbdbd")
"""Okabe and Ito's colours, told apart with every kind of colour vision, for lines on light and on dark ground."""


def page(title: str, body: Sequence[str]) -> str:
    """A whole document; `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{style()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def figure(panels: Sequence[str], caption: str, legend: str = "") -> str:
    """Panels side by side as far as there is room, under one caption."""
    grid = f'<div class="panels">{"".join(panels)}</div>'
    return f"<figure>{legend}{grid}<figcaption>{escape(caption)}</figcaption></figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table whose first column names the rows; plain text in the cells."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(c)}</td>" for c in row[1:])}</tr>'
        for row in rows
    )
    note = f'<p class="note">{escape(caption)}</p>' if caption else ""
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>{note}'


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def style() -> str:
    """The style of pages and pictures, on light and on dark ground."""
    light = "".join(f"--c{i}:{c};" for i, c in enumerate(LIGHT))
    dark = "".join(f"--c{i}:{c};" for i, c in enumerate(DARK))
    colours = "".join(f".c{i}{{--c:var(--c{i})}}" for i in range(len(LIGHT)))
    return (
        f":root{{{light}--ink:#1c1e21;--soft:#5f6670;--rule:#d9dde2;--grid:#e8ebee;--ground:#fdfdfc;--band:.16}}"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}--ink:#e6e8ea;--soft:#9aa3ad;--rule:#3a4048;--grid:#2a2f35;"
        f"--ground:#15181b;--band:.22}}}}{colours}{STYLE}"
    )


STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:75rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.75rem;line-height:1.2;letter-spacing:-.015em;margin:0 0 .4rem}
h2{font-size:1.2rem;line-height:1.3;margin:3rem 0 .6rem;padding-top:.9rem;border-top:1px solid var(--rule)}
p,ul{max-width:46rem;margin:.5rem 0}
ul{padding-left:1.1rem}
li{overflow-wrap:anywhere}
.lead{color:var(--soft)}
.warn{border-left:3px solid var(--c1);padding-left:.8rem}
.note,figcaption{color:var(--soft);font-size:.86rem;line-height:1.5;max-width:46rem;margin:.5rem 0 0}
figure{margin:1.1rem 0 0}
.panels{display:grid;gap:1.3rem 1.6rem;align-items:start;
 grid-template-columns:repeat(auto-fit,minmax(min(100%,15.5rem),1fr))}
svg.figure{width:100%;max-width:23rem;height:auto;display:block;overflow:visible}
.legend{display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;margin:.2rem 0 .7rem;font-size:.9rem;max-width:none}
.legend span{white-space:nowrap}
svg.key{width:1.5rem;height:.55rem;margin-right:.4rem;vertical-align:middle}
text{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}
text.title{font-size:12.5px;font-weight:600;fill:var(--ink)}
text.value{fill:var(--ink)}
text.end{text-anchor:end}
text.middle{text-anchor:middle}
line{stroke-width:1;shape-rendering:crispEdges}
.grid{stroke:var(--grid)}
.axis{stroke:var(--soft)}
.mark{stroke:var(--soft);stroke-dasharray:2 3;opacity:.8}
.line{fill:none;stroke:var(--c);stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}
.dashed{stroke-dasharray:6 4}
.dotted{stroke-dasharray:1 4}
.band{fill:var(--c);opacity:var(--band)}
.dot,.fill{fill:var(--c)}
.hollow{fill:var(--c);opacity:.28}
.whisker{stroke:var(--ink)}
.wide{overflow-x:auto;margin:.9rem 0 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.34rem .9rem .34rem 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
thead th{color:var(--soft);font-weight:500;border-bottom:1px solid var(--rule);vertical-align:bottom}
th:first-child{text-align:left}
tbody th{font-weight:600}
@media print{h2{break-after:avoid}figure,.wide{break-inside:avoid}}
"""
