# SPDX-License-Identifier: Apache-2.0
"""The live display: rich on a terminal, a line every few seconds elsewhere (CI).

Reads `Progress` twice a second and writes to the terminal; measures nothing.  One asyncio
task of the demo's loop, started by `main.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from valve_cli.demo.progress import Progress

REFRESH_S = 0.5
PLAIN_EVERY_S = 10.0
BAR_WIDTH = 48
HOLDER_STYLES = ("blue", "yellow", "magenta", "cyan")


@asynccontextmanager
async def shown(progress: Progress, console: Console) -> AsyncIterator[None]:
    """Show `progress` while the body runs."""
    task = asyncio.create_task(_live(progress, console) if console.is_terminal else _plain(progress, console))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        _print_notes(progress, console)


async def _live(progress: Progress, console: Console) -> None:
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            _print_notes(progress, console)
            live.update(picture(progress), refresh=True)
            await asyncio.sleep(REFRESH_S)


async def _plain(progress: Progress, console: Console) -> None:
    said, since = "", 0.0
    while True:
        _print_notes(progress, console)
        now = asyncio.get_running_loop().time()
        if progress.step + progress.detail != said or now - since >= PLAIN_EVERY_S:
            said, since = progress.step + progress.detail, now
            console.print(line(progress), highlight=False, soft_wrap=True)
        await asyncio.sleep(REFRESH_S)


def _print_notes(progress: Progress, console: Console) -> None:
    while progress.notes:
        console.print(progress.notes.popleft(), highlight=False)


def line(progress: Progress) -> str:
    """The whole state in one line."""
    parts = [f"[{progress.step}]".replace("[", "\\["), progress.detail, f"{progress.elapsed_s:.0f} s"]
    if progress.online:
        done, total, ttft, tpot = progress.online_so_far()
        parts.append(f"online {done}/{total}")
        if ttft is not None:
            parts.append(f"TTFT {ttft:.0f} ms")
        if tpot is not None:
            parts.append(f"TPOT {tpot:.1f} ms")
    rate = progress.offline_rate()
    if rate is not None:
        parts.append(f"offline {rate:.0f} tok/s")
    if progress.gate:
        parts.append(
            f"gate {progress.gate}, {progress.preemptions} preemptions, {progress.reclaims} reclaims"
        )
    return "  ".join(p for p in parts if p)


def picture(progress: Progress) -> RenderableType:
    """The live panel."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", justify="right", min_width=10)
    table.add_column()
    left = progress.left_s
    clock = f"{progress.elapsed_s:.0f} s" + (f", about {left:.0f} s left" if left else "")
    table.add_row("now", Text.assemble((progress.detail or progress.step, "bold"), f"   {clock}"))
    if progress.expected_s:
        table.add_row("", bar([("cyan", min(1.0, progress.elapsed_s / progress.expected_s))]))
    if progress.online:
        done, total, ttft, tpot = progress.online_so_far()
        figures = f"{done}/{total} requests"
        figures += f"   TTFT mean {ttft:.0f} ms" if ttft is not None else ""
        figures += f"   TPOT mean {tpot:.1f} ms" if tpot is not None else ""
        table.add_row("online", figures)
    rate = progress.offline_rate()
    if rate is not None:
        table.add_row(
            "offline",
            f"{rate:5.0f} tokens/s   {progress.offline_running} running   "
            f"{progress.offline_finished} finished",
        )
    if progress.gate:
        style = "bold red" if progress.gate == "paused" else "bold green"
        table.add_row(
            "gate",
            Text.assemble(
                (f"{progress.gate:<6}", style),
                f"   {progress.preemptions} preemptions   {progress.reclaims} reclaims of memory in use",
            ),
        )
    if progress.slabs_total:
        parts = [
            (HOLDER_STYLES[n % len(HOLDER_STYLES)], held / progress.slabs_total)
            for n, held in enumerate(progress.slabs.values())
        ]
        table.add_row("memory", bar(parts))
        legend = Text()
        for n, (name, held) in enumerate(progress.slabs.items()):
            legend.append(f"■ {name} {held}  ", style=HOLDER_STYLES[n % len(HOLDER_STYLES)])
        legend.append(f"of {progress.slabs_total} slabs, {progress.reserved} reserved", style="dim")
        table.add_row("", legend)
    title = "  ".join(
        f"[bold reverse] {step} [/]" if step == progress.step else f"[dim]{step}[/]"
        for step in progress.steps
    )
    return Group(Panel(table, title=title, title_align="left", border_style="dim"))


def bar(parts: list[tuple[str, float]]) -> Text:
    """A bar of coloured parts, each a share of the whole."""
    text = Text()
    used = 0
    for style, share in parts:
        cells = min(BAR_WIDTH - used, round(share * BAR_WIDTH))
        text.append("█" * cells, style=style)
        used += cells
    text.append("░" * (BAR_WIDTH - used), style="dim")
    return text
