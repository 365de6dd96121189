"""Draws head.svg, the figure of how-the-head-works.md: `python docs/figures/head.py`.

A small made-up batch, routed by the head's own rules: what forward keeps, what backward computes as
single pairs and as cells. The background is part of the picture, so that it reads the same on light
and dark pages.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

OUT = Path(__file__).with_name("head.svg")

TOKENS, BLOCKS, TILE = 80, 32, 16
"""Rows and columns of the matrix, and tokens of a tile (128 in the code)."""
ENOUGH = TILE // 8
"""Active tokens from which a cell is computed (one in eight, as in the code)."""
ALONE = 16
"""How many times the threshold one token's mass alone takes (as in the code)."""
TAIL_EPS = 1 / 64
"""Far above the default: 32 blocks stand for a thousand."""
ANSWERS = ((34, 1.0), (20, 1.6), (26, 0.05))
"""Tokens and |gradient| of three answers; the last one's pair is past its margin already."""

Matrix = list[list[float]]
Flags = list[list[bool]]

WIDE, HIGH = 7, 5
"""Pixels of a square."""
SHADES = ("#f1f4f8", "#d3e0f0", "#a3c1e3", "#6396cc", "#2a68ad", "#0b3c78")
BOUNDS = (0.002, 0.008, 0.03, 0.12, 0.4)
INK, FAINT, TARGET = "#1b1f24", "#59636e", "#d9480f"
LEFT, TOP, GAP = 44, 66, 300


def batch() -> tuple[Matrix, list[int], list[float], list[float]]:
    """Masses [TOKENS][BLOCKS]; each token's target block, the target's share of it, |gradient|."""
    draw = random.Random(7)
    masses, targets, shares = [], [], []
    for _ in range(TOKENS):
        # Most tokens are sure of what follows, some are not; frequent rows come first.
        sureness = draw.choice((1.5, 3.0, 4.0, 6.0, 8.0, 8.0))
        logits = [sureness * draw.gauss(0, 1) - 1.3 * math.log(b + 2) for b in range(BLOCKS)]
        total = sum(map(math.exp, logits))
        row = [math.exp(logit) / total for logit in logits]
        masses.append(row)
        targets.append(draw.choices(range(BLOCKS), row)[0])
        shares.append(draw.choice((0.05, 0.5, 0.9, 0.99)))
    gradients = [size for count, size in ANSWERS for _ in range(count)]
    return masses, targets, shares, gradients


def without_targets(masses: Matrix, targets: list[int], shares: list[float]) -> Matrix:
    """What is left of each block's mass beside the target's own probability."""
    rows = zip(masses, targets, shares, strict=True)
    return [
        [mass * (1 - share) if b == target else mass for b, mass in enumerate(row)]
        for row, target, share in rows
    ]


def active_pairs(masses: Matrix, gradients: list[float], factor: float = 1.0) -> Flags:
    """|g_i| * mass >= factor * tail_eps * mean |g|, for each token and block."""
    bound = factor * TAIL_EPS * sum(gradients) / len(gradients)
    return [[g * mass >= bound for mass in row] for row, g in zip(masses, gradients, strict=True)]


def computed_cells(active: Flags, alone: Flags) -> Flags:
    """Which cells [tiles][BLOCKS] of tokens in this order are computed."""
    tiles = []
    for first in range(0, TOKENS, TILE):
        rows = range(first, first + TILE)
        tiles.append(
            [
                sum(active[i][b] for i in rows) >= ENOUGH or any(alone[i][b] for i in rows)
                for b in range(BLOCKS)
            ]
        )
    return tiles


def squares(left: int, chosen: Flags, color: str, height: int = 1) -> str:
    """One path of all cells that are chosen, each one block wide and ``height`` tokens high."""
    h = height * HIGH
    parts = [
        f"M{left + b * WIDE} {TOP + i * h}h{WIDE}v{h}h-{WIDE}z"
        for i, row in enumerate(chosen)
        for b, flag in enumerate(row)
        if flag
    ]
    return f'<path fill="{color}" d="{"".join(parts)}"/>'


def text(
    x: float, y: float, words: str, *, size: int = 12, color: str = INK, more: str = ""
) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}"{more}>{words}</text>'


def dots(left: int, targets: list[int]) -> str:
    return "".join(
        f'<circle cx="{left + (b + 0.5) * WIDE:g}" cy="{TOP + (i + 0.5) * HIGH:g}" r="2" '
        f'fill="{TARGET}"/>'
        for i, b in enumerate(targets)
    )


def frame(left: int, number: int, heading: str, beside: str) -> list[str]:
    wide, high = BLOCKS * WIDE, TOKENS * HIGH
    turned = f' transform="rotate(-90 {left - 8} {TOP + high})"'
    return [
        text(left, 26, f"{number}. {heading}", size=14, more=' font-weight="600"'),
        text(left, 44, beside, color=FAINT),
        text(left, TOP - 6, "vocabulary blocks of 128 rows →", size=11, color=FAINT),
        text(left - 8, TOP + high, "tokens", size=11, color=FAINT, more=turned),
        f'<rect x="{left}" y="{TOP}" width="{wide}" height="{high}" fill="{SHADES[0]}"/>',
    ]


def outline(left: int) -> str:
    return (
        f'<rect x="{left}" y="{TOP}" width="{BLOCKS * WIDE}" height="{TOKENS * HIGH}" '
        f'fill="none" stroke="{FAINT}"/>'
    )


def forward_panel(masses: Matrix, targets: list[int]) -> list[str]:
    wide, bottom = BLOCKS * WIDE, TOP + TOKENS * HIGH
    parts = frame(LEFT, 1, "Forward, once over everything", "shade: probability of a block")
    levels = [[sum(mass >= bound for bound in BOUNDS) for mass in row] for row in masses]
    for level, color in enumerate(SHADES[1:], 1):
        parts.append(squares(LEFT, [[it == level for it in row] for row in levels], color))
    parts += [dots(LEFT, targets), outline(LEFT)]
    for i, name in enumerate(("lse", "logp")):
        x = LEFT + wide + 8 + 14 * i
        turned = f' transform="rotate(-90 {x + 9} {TOP - 4})"'
        parts.append(
            f'<rect x="{x}" y="{TOP}" width="8" height="{TOKENS * HIGH}" fill="{SHADES[2]}" '
            f'stroke="{FAINT}"/>'
        )
        parts.append(text(x + 9, TOP - 4, name, size=11, color=FAINT, more=turned))
    parts.append(
        f'<rect x="{LEFT}" y="{bottom + 8}" width="{wide}" height="8" fill="{SHADES[2]}" '
        f'stroke="{FAINT}"/>'
    )
    parts.append(text(LEFT + wide + 6, bottom + 16, "profile", size=11, color=FAINT))
    kept = ("kept: one number a square (partial_lse),", "two a token, one a vocabulary row")
    return parts + [text(LEFT, bottom + 36 + 16 * i, line) for i, line in enumerate(kept)]


def pairs_panel(active: Flags, targets: list[int], gradients: list[float]) -> list[str]:
    left, bottom = LEFT + GAP, TOP + TOKENS * HIGH
    parts = frame(left, 2, "Backward by pairs (torch)", "tokens gathered block by block")
    parts += [squares(left, active, SHADES[4]), dots(left, targets), outline(left)]
    x = left + BLOCKS * WIDE + 8
    for i, size in enumerate(gradients):
        parts.append(
            f'<rect x="{x}" y="{TOP + i * HIGH}" width="{16 * size:g}" height="{HIGH - 1}" '
            f'fill="{FAINT}"/>'
        )
    parts.append(text(x, TOP - 6, "|g|", size=11, color=FAINT))
    share = sum(map(sum, active)) / (TOKENS * BLOCKS)
    said = (f"recomputed here: {share:.0%} of the squares,", "little of it where |g| is small")
    return parts + [text(left, bottom + 36 + 16 * i, line) for i, line in enumerate(said)]


def cells_panel(active: Flags, alone: Flags, targets: list[int]) -> list[str]:
    left, bottom = LEFT + 2 * GAP, TOP + TOKENS * HIGH
    order = sorted(range(TOKENS), key=lambda i: -sum(active[i]))
    active, alone = [active[i] for i in order], [alone[i] for i in order]
    cells = computed_cells(active, alone)
    parts = frame(left, 3, "Backward by cells (Triton)", "tokens sorted, cut into tiles")
    within = [
        [flag and cells[i // TILE][b] for b, flag in enumerate(row)] for i, row in enumerate(active)
    ]
    parts += [squares(left, cells, SHADES[2], TILE), squares(left, within, SHADES[4])]
    parts += [dots(left, [targets[i] for i in order]), outline(left)]
    for y in range(TOP + TILE * HIGH, bottom, TILE * HIGH):
        parts.append(
            f'<path d="M{left} {y}h{BLOCKS * WIDE}" stroke="{FAINT}" stroke-dasharray="3 3"/>'
        )
    share = sum(map(sum, cells)) * TILE / (TOKENS * BLOCKS)
    said = (f"recomputed here: {share:.0%} of the squares,", "without gathering")
    return parts + [text(left, bottom + 36 + 16 * i, line) for i, line in enumerate(said)]


def legend(y: int) -> list[str]:
    entries = (
        (SHADES[4], "active: recomputed"),
        (SHADES[2], "recomputed with its cell"),
        (SHADES[0], "the tail: averaged, by its exact mass"),
    )
    parts, x = [], LEFT
    for color, words in entries:
        parts.append(
            f'<rect x="{x}" y="{y - 10}" width="11" height="11" fill="{color}" stroke="{FAINT}"/>'
        )
        parts.append(text(x + 17, y, words))
        x += 40 + round(6.3 * len(words))
    parts.append(f'<circle cx="{x + 5}" cy="{y - 4}" r="3" fill="{TARGET}"/>')
    parts.append(text(x + 15, y, "target: exact, by itself"))
    return parts


def figure() -> str:
    """The whole picture as SVG."""
    masses, targets, shares, gradients = batch()
    rest = without_targets(masses, targets, shares)
    active, alone = active_pairs(rest, gradients), active_pairs(rest, gradients, ALONE)
    height = TOP + TOKENS * HIGH + 104
    width = LEFT + 3 * GAP - 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, '
        'sans-serif">',
        "<title>What the head computes and keeps</title>",
        "<desc>A matrix of tokens and vocabulary blocks, three times: the probability of each "
        "block, known from forward; the pairs that the torch head recomputes in backward; the "
        "cells of sorted tokens that the Triton head recomputes.</desc>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        *forward_panel(masses, targets),
        *pairs_panel(active, targets, gradients),
        *cells_panel(active, alone, targets),
        *legend(height - 20),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    OUT.write_text(figure(), encoding="utf-8")
