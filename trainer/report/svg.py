"""Drawings as inline SVG, whose colours and widths are CSS classes of the page."""

from __future__ import annotations

from html import escape

from ..text import visible
from .marks import DOT_RADIUS, LOOKS, PALETTE, TEXT_SIZE, WIDTH, Dot, Drawing, Label, Look, Path

PHONE_TEXT_SIZE = TEXT_SIZE + 2


def svg(drawing: Drawing) -> str:
    """The drawing as one `<svg>` element, as wide as what holds it."""
    seen = escape(visible(drawing.description), quote=True)
    box = f'viewBox="0 0 {WIDTH:g} {drawing.height:g}"'
    return f'<svg {box} role="img" aria-label="{seen}">{"".join(map(_mark, drawing.marks))}</svg>'


def _mark(mark: Path | Dot | Label) -> str:
    if isinstance(mark, Label):
        place = f'x="{mark.x:.1f}" y="{mark.y:.1f}"'
        return f'<text {place} text-anchor="{mark.anchor}">{escape(visible(mark.text))}</text>'
    if isinstance(mark, Dot):
        place = f'cx="{mark.x:.1f}" cy="{mark.y:.1f}" r="{DOT_RADIUS:g}"'
        title = f"<title>{escape(visible(mark.title))}</title>"
        return f'<circle class="{mark.colour}" {place}>{title}</circle>'
    outline = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in mark.places)
    closed = "" if LOOKS[mark.kind].width else "Z"
    return f'<path class="{mark.kind} {mark.colour}" d="{outline}{closed}"/>'


def colour_rules() -> str:
    """CSS: the palette as variables, light or dark, and a class for each colour of a mark."""
    light = ";".join(f"--{name}:{light}" for name, (light, _) in PALETTE.items())
    dark = ";".join(f"--{name}:{dark}" for name, (_, dark) in PALETTE.items())
    marks = [name for name in PALETTE if name not in ("paper", "card", "ink")]
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media(prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        + "".join(f".{name}{{color:var(--{name})}}" for name in marks)
    )


def mark_rules(fonts: str) -> str:
    """CSS of the elements that `svg` writes."""
    return (
        "svg{display:block;width:100%;height:auto;overflow:visible}"
        f"svg text{{fill:var(--soft);font:{TEXT_SIZE:g}px {fonts};"
        "font-variant-numeric:tabular-nums}"
        f"@media(max-width:560px){{svg text{{font-size:{PHONE_TEXT_SIZE:g}px}}}}"
        "svg circle{fill:currentColor;stroke:var(--card);stroke-width:1.2}"
        + "".join(f"svg .{kind}{{{_look(look)}}}" for kind, look in LOOKS.items())
    )


def _look(look: Look) -> str:
    if not look.width:
        return f"fill:currentColor;fill-opacity:{look.opacity:g}"
    dashes = f";stroke-dasharray:{look.dashes[0]:g} {look.dashes[1]:g}" if look.dashes else ""
    return (
        f"fill:none;stroke:currentColor;stroke-width:{look.width:g};"
        f"stroke-opacity:{look.opacity:g};stroke-linejoin:round{dashes}"
    )
