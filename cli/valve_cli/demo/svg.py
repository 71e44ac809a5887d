# SPDX-License-Identifier: Apache-2.0
"""A small drawing kit: one plot with two linear axes, as inline SVG.

Colours come from CSS classes of the page, so that light and dark follow the reader's
setting.  Pure; called by `charts.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float]


def nice_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round values covering [low, high], about `wanted` of them, steps of 1, 2 or 5 × 10ⁿ."""
    if not high > low:
        return [low]
    raw = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's label: as short as it can be."""
    return f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:g}"


@dataclass
class Plot:
    """Width, height and margins in user units (pixels at full width); domains in data units."""

    width: float
    height: float
    x_domain: tuple[float, float]
    y_domain: tuple[float, float]
    left: float = 56
    right: float = 16
    top: float = 12
    bottom: float = 36
    title: str = ""
    _parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        low, high = self.x_domain
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_domain
        return (
            self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)
        )

    def raw(self, text: str) -> None:
        self._parts.append(text)

    def x_axis(self, label: str, wanted: int = 10) -> None:
        """Ticks and label below; a light line at each tick."""
        base, top = self.height - self.bottom, self.top
        for tick in nice_ticks(*self.x_domain, wanted):
            at = self.x(tick)
            self.raw(f'<line class="grid" x1="{at:.1f}" y1="{top:.1f}" x2="{at:.1f}" y2="{base:.1f}"/>')
            self.text(at, base + 15, number(tick), "tick", "middle")
        self.raw(
            f'<line class="axis" x1="{self.left}" y1="{base}" x2="{self.width - self.right}" y2="{base}"/>'
        )
        self.text((self.left + self.width - self.right) / 2, self.height - 4, label, "label", "middle")

    def y_axis(self, label: str, wanted: int = 4, suffix: str = "") -> None:
        for tick in nice_ticks(*self.y_domain, wanted):
            at = self.y(tick)
            end = self.width - self.right
            self.raw(f'<line class="grid" x1="{self.left}" y1="{at:.1f}" x2="{end}" y2="{at:.1f}"/>')
            self.text(self.left - 7, at + 4, number(tick) + suffix, "tick", "end")
        middle = (self.top + self.height - self.bottom) / 2
        self.raw(
            f'<text class="label" text-anchor="middle" transform="translate(12 {middle:.1f}) rotate(-90)">'
            f"{escape(label)}</text>"
        )

    def text(self, x: float, y: float, content: str, style: str, anchor: str = "start") -> None:
        self.raw(
            f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'
        )

    def line(self, points: Iterable[Point], style: str) -> None:
        """A polyline through data points."""
        path = " L".join(f"{self.x(a):.1f} {self.y(b):.1f}" for a, b in points)
        if path:
            self.raw(f'<path class="{style}" d="M{path}"/>')

    def steps(self, points: Sequence[Point], style: str) -> None:
        """A line that keeps each value until the next point; the last until the right edge."""
        if points:
            self.raw(f'<path class="{style}" d="M{self._stairs(points)}"/>')

    def _stairs(self, points: Sequence[Point]) -> str:
        parts = [f"{self.x(points[0][0]):.1f} {self.y(points[0][1]):.1f}"]
        for a, b in points[1:]:
            parts.append(f"H{self.x(a):.1f}V{self.y(b):.1f}")
        parts.append(f"H{self.x(self.x_domain[1]):.1f}")
        return "".join(parts)

    def step_area(self, points: Sequence[Point], style: str) -> None:
        """The area under a step line, down to the lower end of the y domain."""
        if points:
            base = self.y(self.y_domain[0])
            self.raw(
                f'<path class="{style}" d="M{self._stairs(points)}V{base:.1f}H{self.x(points[0][0]):.1f}Z"/>'
            )

    def bands(self, spans: Iterable[tuple[float, float]], top: float, height: float, style: str) -> None:
        """Rectangles over x spans, at a fixed place in pixels; cut to the plot."""
        low, high = self.x_domain
        parts = []
        for a, b in spans:
            if b <= low or a >= high:
                continue
            x0, x1 = self.x(max(a, low)), self.x(min(b, high))
            parts.append(
                f"M{x0:.2f} {top:.1f}h{max(x1 - x0, 0.4):.2f}v{height:.1f}h-{max(x1 - x0, 0.4):.2f}z"
            )
        if parts:
            self.raw(f'<path class="{style}" d="{"".join(parts)}"/>')

    def ticks_at(self, values: Iterable[tuple[float, str]], top: float, height: float, style: str) -> None:
        """Short vertical marks with a tooltip each."""
        low, high = self.x_domain
        for value, tip in values:
            if low <= value <= high:
                at = self.x(value)
                self.raw(
                    f'<line class="{style}" x1="{at:.1f}" y1="{top:.1f}"'
                    f' x2="{at:.1f}" y2="{top + height:.1f}">'
                    f"<title>{escape(tip)}</title></line>"
                )

    def render(self) -> str:
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{escape(self.title)}">'
            + "".join(self._parts)
            + "</svg>"
        )
