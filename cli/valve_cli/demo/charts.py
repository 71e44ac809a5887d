# SPDX-License-Identifier: Apache-2.0
"""The report's pictures, drawn with `svg.Plot`.

Pure: records and the agent's timeline in, SVG text out.  Called by `page.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from valve_cli.demo.events import PoolState, Timeline
from valve_cli.demo.phases import PhaseRecord
from valve_cli.demo.stats import percentile, tokens_between, union
from valve_cli.demo.svg import Plot

WIDE = 1040.0
HALF = 510.0
RATE_BIN_S = 0.5
ZOOM_S = 12.0
STEP_NS = 500_000_000
"""About what an offline step takes."""
LANE_LEFT = 116.0
COMPARED = ("alone", "naive", "valve")


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Small squares and their meaning: (CSS class of the square, text)."""
    items = "".join(f'<span class="key"><i class="{style}"></i>{text}</span>' for style, text in entries)
    return f'<div class="legend">{items}</div>'


def lanes(record: PhaseRecord, timeline: Timeline | None, span_s: tuple[float, float], ticks: int) -> str:
    """Online busy, offline paused (with a timeline) and the offline rate over [from, to] seconds
    of the phase."""
    begin, end = record.window
    low, high = span_s

    def seconds(spans: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
        return [((a - begin) / 1e9, (b - begin) / 1e9) for a, b in spans]

    busy = union([(r.sent_ns, r.end_ns) for r in record.requests])
    rows = [("online busy", seconds(busy), "fill-online")]
    if timeline:
        rows.append(("offline paused", seconds(timeline.paused_spans(end)), "fill-paused"))
    rates = rate_bins(record, low, high)
    top, bar, gap = 10.0, 26.0, 8.0
    rate_top = top + len(rows) * (bar + gap) + 4
    ceiling = max([r for _, r in rates] + [1.0]) * 1.08
    plot = Plot(WIDE, rate_top + 132, span_s, (0, ceiling), left=LANE_LEFT, top=rate_top)
    plot.title = "activity over time"
    plot.x_axis("seconds since the first request of the phase", ticks)
    plot.y_axis("", 3)
    plot.text(plot.left - 46, rate_top + 36, "offline", "lane", "end")
    plot.text(plot.left - 46, rate_top + 51, "tokens/s", "lane-unit", "end")
    width = WIDE - plot.left - plot.right
    for number, (name, spans, style) in enumerate(rows):
        at = top + number * (bar + gap)
        plot.raw(f'<rect class="track" x="{plot.left}" y="{at}" width="{width}" height="{bar}" rx="3"/>')
        plot.text(plot.left - 10, at + bar / 2 + 4, name, "lane", "end")
        plot.bands(spans, at, bar, style)
    plot.step_area(rates, "fill-offline soft")
    plot.steps(rates, "line-offline")
    return plot.render()


def rate_bins(record: PhaseRecord, low: float, high: float) -> list[tuple[float, float]]:
    """(begin of the bin in seconds, offline tokens/s) for bins of about RATE_BIN_S."""
    bins = max(1, round((high - low) / RATE_BIN_S))
    width = (high - low) / bins
    edges = [record.window[0] + round((low + n * width) * 1e9) for n in range(bins + 1)]
    samples = stepped(record.offline_samples)
    return [
        (low + n * width, tokens_between(samples, span) / ((span[1] - span[0]) / 1e9))
        for n, span in enumerate(pairwise(edges))
    ]


def stepped(samples: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The samples with the tokens of a long step, one that a pause interrupted, put at its end:
    they would otherwise seem to have been made during the pause."""
    made: list[tuple[int, int]] = []
    for t_ns, tokens in samples:
        if made and t_ns - made[-1][0] > 2 * STEP_NS:
            made.append((t_ns - STEP_NS, made[-1][1]))
        made.append((t_ns, tokens))
    return made


def busiest(record: PhaseRecord, timeline: Timeline) -> tuple[float, float]:
    """The stretch of ZOOM_S seconds with the most pauses: the one worth a closer look."""
    begin, end = record.window
    whole = (end - begin) / 1e9
    if whole <= ZOOM_S:
        return (0.0, whole)
    times = [(t - begin) / 1e9 for t, _ in timeline.pauses if begin <= t <= end]
    starts = [min(max(0.0, t - 0.5), whole - ZOOM_S) for t in times] or [0.0]
    best = max(starts, key=lambda s: sum(1 for t in times if s <= t < s + ZOOM_S))
    return (best, best + ZOOM_S)


def memory(record: PhaseRecord, timeline: Timeline, slabs: int, slab_mib: float) -> str:
    """Who holds the device's slabs; below, online's part and its reservation on a scale of
    their own.  Marks: reclaims of memory in use."""
    begin, end = record.window
    whole = (end - begin) / 1e9
    states = within(timeline.pool, begin, end)

    def series(value: Callable[[PoolState], int]) -> list[tuple[float, float]]:
        points = [(max(0.0, (s.t_ns - begin) / 1e9), value(s) * slab_mib) for s in states]
        return thinned(points, whole / WIDE)

    online = series(lambda s: sum(s.held.values()) - held_by(s, "offline"))
    reserved = series(lambda s: s.reservation)
    marks = [
        (
            (r.t_ns - begin) / 1e9,
            f"{r.bytes_in_use / 2**20:.0f} MiB in use taken from {r.requests_harmed} offline requests"
            f" in {r.duration_us / 1000:.1f} ms",
        )
        for r in timeline.reclaims
        if r.bytes_in_use and begin <= r.t_ns <= end
    ]
    all_of_it = Plot(WIDE, 250, (0, whole), (0, slabs * slab_mib), left=LANE_LEFT, top=34)
    all_of_it.title = "slab ownership over time"
    tracked(all_of_it)
    all_of_it.step_area(series(lambda s: sum(s.held.values())), "fill-online")
    all_of_it.step_area(series(lambda s: held_by(s, "offline")), "fill-offline")
    all_of_it.x_axis("", 12)
    all_of_it.y_axis("MiB, whole device")
    all_of_it.ticks_at(marks, 10, 18, "mark-reclaim")
    all_of_it.text(all_of_it.left - 10, 23, "reclaims", "lane", "end")
    high = max([v for _, v in online + reserved] + [slab_mib]) * 1.1
    part = Plot(WIDE, 200, (0, whole), (0, high), left=LANE_LEFT, top=8)
    part.title = "online's memory and its reservation over time"
    tracked(part)
    part.step_area(online, "fill-online soft")
    part.x_axis("seconds since the first request of the phase", 12)
    part.y_axis("MiB, online", 4)
    part.steps(reserved, "line-reserve")
    return all_of_it.render() + part.render()


def tracked(plot: Plot) -> None:
    """The plot's ground."""
    plot.raw(
        f'<rect class="track" x="{plot.left}" y="{plot.top}" width="{WIDE - plot.left - plot.right}"'
        f' height="{plot.height - plot.top - plot.bottom}"/>'
    )


def within(states: Sequence[PoolState], begin: int, end: int) -> list[PoolState]:
    """States of the window, with the one in force at its begin."""
    before = [s for s in states if s.t_ns < begin]
    return before[-1:] + [s for s in states if begin <= s.t_ns <= end]


def held_by(state: PoolState, tenant: str) -> int:
    return state.held.get(tenant, 0)


def thinned(points: Sequence[tuple[float, float]], least: float) -> list[tuple[float, float]]:
    """Of points closer than `least` in x, the last: nothing that could be seen is lost."""
    kept: list[tuple[float, float]] = []
    for point in points:
        if kept and len(kept) > 1 and point[0] - kept[-1][0] < least:
            kept[-1] = (kept[-1][0], point[1])
        else:
            kept.append(point)
    return kept


def distribution(samples: Mapping[str, Sequence[float]], label: str) -> str:
    """Cumulative shares of each phase's requests; the axis ends where 1 % of the worst phase is left."""
    edges = [percentile(values, 0.99) for values in samples.values() if values]
    high = max(edges) * 1.06 if edges else 1.0
    plot = Plot(HALF, 270, (0, high), (0, 100), title=label)
    plot.x_axis(label, 6)
    plot.y_axis("% of requests", 5)
    for name in COMPARED:
        values = sorted(samples.get(name, ()))
        if not values:
            continue
        points = [(0.0, 0.0)]
        for n, value in enumerate(values, start=1):
            points += [(min(value, high), points[-1][1]), (min(value, high), 100 * n / len(values))]
            if value > high:
                points.pop()
                break
        plot.line(points, f"line-{name}")
    return plot.render()


def latencies(values_us: Sequence[float]) -> str:
    """Cumulative share of preemptions by latency, with the promise."""
    high = max([*values_us, 1000.0]) * 1.05
    plot = Plot(HALF, 270, (0, high), (0, 100), title="preemption latency")
    plot.x_axis("preemption latency, µs", 6)
    plot.y_axis("% of preemptions", 5)
    ordered = sorted(values_us)
    points = [(0.0, 0.0)]
    for n, value in enumerate(ordered, start=1):
        points += [(value, points[-1][1]), (value, 100 * n / len(ordered))]
    plot.line(points, "line-valve")
    at = plot.x(1000.0)
    plot.raw(
        f'<line class="limit" x1="{at:.1f}" y1="{plot.top}" x2="{at:.1f}" y2="{plot.height - plot.bottom}"/>'
    )
    if at > plot.width / 2:
        plot.text(at - 6, plot.top + 14, "promised: p99 < 1 ms", "label", "end")
    else:
        plot.text(at + 6, plot.height - plot.bottom - 10, "promised: p99 < 1 ms", "label")
    return plot.render()


def reclaim_sizes(timeline: Timeline, window: tuple[int, int]) -> str:
    """Every reclaim of memory in use: how much, how long."""
    chosen = [r for r in timeline.reclaims if r.bytes_in_use and window[0] <= r.t_ns <= window[1]]
    wide = max([r.bytes / 2**20 for r in chosen] + [1.0]) * 1.08
    high = max([r.duration_us / 1000 for r in chosen] + [0.5]) * 1.1
    plot = Plot(HALF, 270, (0, wide), (0, high), title="reclaims by size and duration")
    plot.x_axis("MiB taken in one reclaim", 6)
    plot.y_axis("ms until online had it", 5)
    for r in chosen:
        plot.raw(
            f'<circle class="dot" r="4" cx="{plot.x(r.bytes / 2**20):.1f}"'
            f' cy="{plot.y(r.duration_us / 1000):.1f}">'
            f"<title>{r.bytes / 2**20:.0f} MiB, {r.requests_harmed} requests harmed,"
            f" {r.duration_us / 1000:.2f} ms</title></circle>"
        )
    return plot.render()
