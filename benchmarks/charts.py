"""Line charts as SVG, for figures that a README shows: axes, lines with marks, a legend; nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 36, 64
COLORS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d5a97", "#e08e0b", "#555555")
TICKS = 5

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """`lines` by name; both axes start at 0."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Points]

    def svg(self) -> str:
        points = [point for line in self.lines.values() for point in line]
        x_end, y_end = (round_up(max((point[i] for point in points), default=1.0)) for i in (0, 1))

        def place(x: float, y: float) -> tuple[float, float]:
            across = LEFT + x / x_end * (WIDTH - LEFT - RIGHT)
            return round(across, 1), round(HEIGHT - BOTTOM - y / y_end * (HEIGHT - TOP - BOTTOM), 1)

        parts = [_text(WIDTH / 2, 20, self.title, size=14)]
        for i in range(TICKS + 1):
            share = i / TICKS
            x, low = place(x_end * share, 0)
            left, y = place(0, y_end * share)
            parts.append(f'<line x1="{left}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="#ddd"/>')
            parts.append(_text(x, low + 15, f"{x_end * share:g}"))
            parts.append(_text(left - 6, y + 4, f"{y_end * share:g}", anchor="end"))
        parts.append(_text(WIDTH / 2, HEIGHT - 32, self.x_label))
        parts.append(_text(14, HEIGHT / 2, self.y_label, turn=True))
        for i, (name, line) in enumerate(self.lines.items()):
            color = COLORS[i % len(COLORS)]
            placed = [place(*point) for point in line]
            path = " ".join(f"{x},{y}" for x, y in placed)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
            parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>' for x, y in placed]
            across = LEFT + i * (WIDTH - LEFT - RIGHT) / len(self.lines)
            parts.append(f'<rect x="{across}" y="{HEIGHT - 18}" width="10" height="10" fill="{color}"/>')
            parts.append(_text(across + 14, HEIGHT - 9, name, anchor="start"))
        body = "\n".join(parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">\n'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
        )


def round_up(value: float) -> float:
    """Where an axis ends whose ticks shall be round."""
    if value <= 0:
        return 1.0
    power = 1.0
    while power * 10 <= value:
        power *= 10
    while power > value:
        power /= 10
    return next(power * step for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if power * step >= value)


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "middle", turn: bool = False) -> str:
    turned = f' transform="rotate(-90 {x} {y})"' if turn else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}"{turned}>{escape(text)}</text>'
