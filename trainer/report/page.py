"""The pieces of a report's HTML. Every value that comes from outside goes through `text`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from ..monitor.history import Change, flatten
from ..text import figure
from .charts import Chart, svg
from .ridges import Ridges, ridges_svg

STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf8;--card:#fff;--ink:#1d1f23;--soft:#666b75;
--rule:#e4e2dd;--accent:#2563c9;--muted:#a3a8b3;--chosen:#12836b;--rejected:#c8622a;
--c0:#2563c9;--c1:#c8622a;--c2:#12836b;--c3:#9a3fb5;--c4:#a87b00;--c5:#c2335d;--c6:#0f8aa8;
--c7:#6b7280}
@media(prefers-color-scheme:dark){:root{--paper:#131519;--card:#1a1d22;--ink:#e8e8ea;--soft:#9a9fab;
--rule:#2c3038;--accent:#79a9ff;--muted:#666c79;--chosen:#4fc7a6;
--rejected:#f09a63;--c0:#79a9ff;--c1:#f09a63;--c2:#4fc7a6;--c3:#d490e8;--c4:#dcb64a;--c5:#f47c9c;
--c6:#5cc6df;--c7:#a6acb8}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1060px;margin:0 auto;padding:56px 24px 80px}
.kicker{color:var(--soft);font-size:14px;margin:0 0 10px;overflow-wrap:anywhere}
h1{font-size:clamp(28px,5.2vw,46px);line-height:1.12;letter-spacing:-.022em;font-weight:650;margin:0;
text-wrap:balance}
h2{font-size:20px;letter-spacing:-.01em;font-weight:620;margin:60px 0 18px}
.lead{color:var(--soft);font-size:17px;margin:16px 0 0;padding:0;list-style:none;
overflow-wrap:anywhere;display:flex;flex-wrap:wrap;gap:2px 26px}
.grid{display:grid;gap:20px;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr))}
.grid.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,280px),1fr))}
.card{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:18px 20px;
min-width:0;margin:0}
.chart h3{font-size:16px;font-weight:620;margin:0}
.chart p{color:var(--soft);font-size:13.5px;margin:1px 0 8px}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;color:var(--soft);margin:0 0 8px;
padding:0;list-style:none}
.legend b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.legend i{display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;
vertical-align:middle;background:currentColor}
.legend i.dots{width:7px;height:7px;border-radius:50%}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font:12.5px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;
font-variant-numeric:tabular-nums}
svg .grid{stroke:var(--rule);stroke-width:1;fill:none}
svg .reference{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 4;fill:none}
svg .line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .line.muted{stroke-width:1.4}
svg .band{fill:currentColor;opacity:.16;stroke:none}
svg circle{fill:currentColor;stroke:var(--card);stroke-width:1.2}
.accent{color:var(--accent)}.muted{color:var(--muted)}
.chosen{color:var(--chosen)}.rejected{color:var(--rejected)}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}.c7{color:var(--c7)}
svg .ridge{fill:currentColor;fill-opacity:.32;stroke:none}svg .ridge.faint{fill-opacity:.1}
svg .crest{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round}
svg .crest.faint{stroke-width:1.2;stroke-opacity:.6}
.mark{display:inline-block;width:9px;height:9px;border-radius:50%;background:currentColor;
margin-right:6px}
.scroll{overflow-x:auto}.wide{grid-column:1/-1}
.strip{margin-bottom:20px}.strip .asked{font-weight:600;margin:0 0 12px;white-space:pre-wrap;
overflow-wrap:anywhere;max-height:9.5em;overflow-y:auto}
.across{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(190px,1fr);
overflow-x:auto;gap:0}
.across>div{border-left:1px solid var(--rule);padding:0 16px}
.across>div:first-child{padding-left:0;border-left:0}
.strip h4{font-size:13px;font-weight:500;color:var(--soft);margin:0 0 4px}
.strip h4 small{font-size:12.5px}
.strip div>p{margin:0;font-size:14.5px;line-height:1.45;white-space:pre-wrap;overflow-wrap:anywhere;
max-height:13em;overflow-y:auto;padding-bottom:1.6em;
mask-image:linear-gradient(#000 calc(100% - 2em),transparent)}
.strip div>p:empty:after{content:"(nothing)";color:var(--soft)}
table{border-collapse:collapse;width:100%;font-size:15px}
th,td{text-align:left;padding:7px 14px 7px 0;border-bottom:1px solid var(--rule);vertical-align:top}
tr:last-child>th,tr:last-child>td{border-bottom:0}
tr>th:first-child{white-space:nowrap}
th{font-weight:500}thead th{color:var(--soft);font-size:13px}
td{font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
td.n,th.n{text-align:right;white-space:nowrap;padding-right:0;padding-left:14px}
.pairs tr>th{color:var(--soft);width:46%;white-space:normal;overflow-wrap:anywhere}
details.card summary{cursor:pointer;font-weight:600}
details.card table{margin-top:10px}
.stack>*+*{margin-top:20px}
.sample dt{color:var(--soft);font-size:13px}.sample dd{margin:0 0 10px;overflow-wrap:anywhere;
white-space:pre-wrap}.sample dd:last-child{margin:0}
.sample dd:empty:after{content:"(nothing)";color:var(--soft)}
.sample .after{font-weight:600}
.note{color:var(--soft);font-size:14px;overflow-wrap:anywhere}
@media(max-width:560px){main{padding:34px 16px 56px}.card{padding:16px 15px}h2{margin-top:46px}
table{font-size:14px}svg text{font-size:14.5px}}
@media print{main{padding:0}.card{break-inside:avoid}}
"""


def text(value: object) -> str:
    """Any value as escaped HTML text; containers as JSON."""
    if isinstance(value, (Mapping, list, tuple)):
        value = json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, float):
        value = f"{value:.6g}"
    if value is None or isinstance(value, bool):
        value = str(value).lower()
    return escape(str(value), quote=True)


def page(title: str, body: Iterable[str]) -> str:
    """A whole document that loads nothing: the policy forbids it, should escaping ever fail."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n"
        "<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def changes_table(changes: list[Change], first: str, last: str) -> str:
    """Metrics before and after; the first column of numbers goes when nothing has a before."""
    with_before = any(change.before is not None for change in changes)
    rows = []
    for change in changes:
        before = "" if change.before is None else figure(change.before)
        cells = f'<td class="n">{before}</td>' if with_before else ""
        cells += f'<td class="n"><b>{figure(change.after)}</b></td>'
        rows.append(f"<tr><th>{text(change.label)}</th>{cells}</tr>")
    head = f'<th class="n">{text(first)}</th>' if with_before else ""
    head += f'<th class="n">{text(last)}</th>'
    return (
        f'<div class="card scroll"><table><thead><tr><th></th>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def chart_card(chart: Chart, last_step: float) -> str:
    """A chart with its title, a line of explanation and a legend that ends in the last value."""
    entries = []
    for line in chart.lines:
        value = next(v for _, v in reversed(line.points) if math.isfinite(v))
        mark = ' class="dots"' if line.style == "dots" else ""
        entries.append(
            f'<li><span class="{line.colour}"><i{mark}></i></span>{text(line.label)} '
            f"<b>{figure(value)}</b></li>"
        )
    return (
        f'<section class="card chart"><h3>{text(chart.title)}</h3><p>{text(chart.note)}</p>'
        f'<ul class="legend">{"".join(entries)}</ul>{svg(chart, last_step)}</section>'
    )


def ridges_card(chart: Ridges) -> str:
    """Histograms with their title, a line of explanation, and a legend where they need one."""
    entries = "".join(
        f'<li><span class="{ridge.colour}"><i></i></span>{text(ridge.label)}</li>'
        for ridge in chart.ridges
    )
    legend = "" if chart.named else f'<ul class="legend">{entries}</ul>'
    return (
        f'<section class="card chart"><h3>{text(chart.title)}</h3><p>{text(chart.note)}</p>'
        f"{legend}{ridges_svg(chart)}</section>"
    )


def card(content: str, kind: str = "") -> str:
    return f'<div class="card {kind}">{content}</div>'


def section(title: str, cards: list[str], *, small: bool = False) -> list[str]:
    """A heading and a grid of the cards that hold something."""
    filled = "".join(cards)
    grid = "grid small" if small else "grid"
    return [f'<h2>{title}</h2><div class="{grid}">{filled}</div>'] if filled else []


def details(title: str, values: Mapping[str, Any], *, is_open: bool = False) -> str:
    """A folding table of names and values; nothing when there are none."""
    if not values:
        return ""
    rows = "".join(
        f"<tr><th>{_breakable(name)}</th><td>{_breakable(value)}</td></tr>"
        for name, value in flatten(values)
    )
    return (
        f'<details class="card"{" open" if is_open else ""}><summary>{text(title)}</summary>'
        f'<table class="pairs"><tbody>{rows}</tbody></table></details>'
    )


def _breakable(value: object) -> str:
    """Escaped text that may wrap after the marks that join a path's or a setting's words."""
    return re.sub(r"([_./])", r"\1<wbr>", text(value))


def sample_card(sample: Mapping[str, Any]) -> str:
    """A prompt and what the model answered before and after training."""
    labels = (("prompt", "prompt"), ("before", "before training"), ("after", "after training"))
    items = "".join(
        f'<dt>{label}</dt><dd class="{key}">{text(sample[key])}</dd>'
        for key, label in labels
        if sample.get(key) is not None
    )
    return f'<dl class="card sample">{items}</dl>' if items else ""
