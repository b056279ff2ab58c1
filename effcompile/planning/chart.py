"""Draw where the modelled time goes, and how kernels compare over the length, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_WIDTH = 760
_ROW = 30
_LABEL = 230
_NOTE = 210  # room for the figure and note behind the longest bar


def bars(rows: Sequence[tuple[str, float, float, str]], unit: str = "ms", scale: float = 1e-3) -> str:
    """Draw one bar a row of (label, seconds, floor seconds or 0, note); the darker part is the roofline floor."""
    if not rows:
        return ""
    most = max(seconds for _, seconds, _, _ in rows) or 1.0
    room = _WIDTH - _LABEL - _NOTE
    height = _ROW * len(rows) + 8
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="modelled time by part" class="chart">']
    for place, (label, seconds, least, note) in enumerate(rows):
        top = place * _ROW + 4
        width = max(1.5, room * seconds / most)
        shown = label if len(label) <= 34 else label[:32] + "…"
        parts.append(f'<text x="{_LABEL - 8}" y="{top + 15}" text-anchor="end">{escape(shown)}</text>')
        parts.append(f'<rect x="{_LABEL}" y="{top + 2}" width="{width:.1f}" height="18" rx="2" class="bar"/>')
        if least:
            parts.append(
                f'<rect x="{_LABEL}" y="{top + 2}" width="{room * min(least, seconds) / most:.1f}" height="18" rx="2" '
                'class="floor"/>'
            )
        text = f"{seconds / scale:.3g} {unit}" + (f" · {note}" if note else "")
        parts.append(f'<text x="{_LABEL + width + 6:.1f}" y="{top + 15}" class="value">{escape(text)}</text>')
    return "".join([*parts, "</svg>"])


def intervals(rows: Sequence[tuple[str, Sequence[tuple[int, int]], int, int]]) -> str:
    """Draw on a logarithmic axis of lengths where each kernel pays: rows of (label, ranges, lowest, highest)."""
    if not rows:
        return ""
    low, high = min(row[2] for row in rows), max(row[3] for row in rows)
    room, height = _WIDTH - _LABEL - 30, _ROW * len(rows) + 34

    def at(length: int) -> float:
        return _LABEL + room * math.log(length / low) / math.log(high / low)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="lengths at which a kernel pays" class="chart">'
    ]
    ticks = [length for length in (2**power for power in range(4, 21)) if low <= length <= high]
    for length in ticks:
        name = f"{length // 1024}k" if length >= 1024 else str(length)
        parts.append(f'<line x1="{at(length):.1f}" y1="2" x2="{at(length):.1f}" y2="{height - 26}" class="grid"/>')
        parts.append(f'<text x="{at(length):.1f}" y="{height - 10}" text-anchor="middle" class="value">{name}</text>')
    for place, (label, ranges, _, _) in enumerate(rows):
        top = place * _ROW + 4
        parts.append(f'<text x="{_LABEL - 8}" y="{top + 15}" text-anchor="end">{escape(label)}</text>')
        for begin, end in ranges:
            width = max(2.0, at(end) - at(begin))
            parts.append(
                f'<rect x="{at(begin):.1f}" y="{top + 2}" width="{width:.1f}" height="18" rx="2" class="floor"/>'
            )
    return "".join([*parts, "</svg>"])
