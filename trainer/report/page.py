"""The pieces of a report's HTML. Every value that comes from outside goes through `text`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from ..monitor.history import Run, flatten
from ..text import visible
from .marks import Drawing
from .svg import colour_rules, mark_rules, svg

FONTS = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif'
LAYOUT = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 @FONTS;
-webkit-text-size-adjust:100%}
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
table{font-size:14px}}
@media print{main{padding:0}.card{break-inside:avoid}}
""".replace("@FONTS", FONTS)
STYLE = f"\n{colour_rules()}{LAYOUT}{mark_rules(FONTS)}\n"


def text(value: object) -> str:
    """Any value as escaped HTML text; containers as JSON."""
    if isinstance(value, (Mapping, list, tuple)):
        value = json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, float):
        value = f"{value:.6g}"
    if value is None or isinstance(value, bool):
        value = str(value).lower()
    return escape(visible(str(value)), quote=True)


def page(title: str, body: Iterable[str]) -> str:
    """An HTML document that loads nothing: a policy forbids it, should escaping ever fail."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n"
        "<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def numbers_table(
    heads: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]], kind: str = ""
) -> str:
    """Rows of numbers with a label each; heads and numbers are HTML."""
    columns = "".join(f'<th class="n">{head}</th>' for head in heads)
    filled = ""
    for label, cells in rows:
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        filled += f"<tr><th>{text(label)}</th>{numbers}</tr>"
    head = f"<thead><tr><th></th>{columns}</tr></thead>"
    return f'<div class="card scroll {kind}"><table>{head}<tbody>{filled}</tbody></table></div>'


def drawing_card(drawing: Drawing) -> str:
    """A drawing with its title, a line of explanation, and its legend."""
    keys = []
    for key in drawing.keys:
        mark = ' class="dots"' if key.dots else ""
        value = f" <b>{key.value}</b>" if key.value else ""
        sign = f'<span class="{key.colour}"><i{mark}></i></span>'
        keys.append(f"<li>{sign}{text(key.label)}{value}</li>")
    legend = f'<ul class="legend">{"".join(keys)}</ul>' if keys else ""
    return (
        f'<section class="card chart"><h3>{text(drawing.title)}</h3><p>{text(drawing.note)}</p>'
        f"{legend}{svg(drawing)}</section>"
    )


def section(title: str, cards: Iterable[str], *, small: bool = False) -> list[str]:
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


def not_finite(run: Run) -> str:
    """The metrics with values that charts leave out, and how many of each."""
    return ", ".join(f"{key} ({count})" for key, count in run.not_finite().items())


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
