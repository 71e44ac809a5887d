# SPDX-License-Identifier: Apache-2.0
"""`valve top` on a terminal: one panel per device, a bar of its memory, a line per tenant.

Threading model: pure; makes rich renderables of values. Caller: top/main.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from valve_api.quantity import format_quantity
from valve_cli.top.view import DeviceView, Screen, TenantView

BAR_CELLS = 48
_STYLES = {"online": "green", "offline": "blue", "kept for online": "yellow", "free": "bright_black"}
_STATE_STYLES = {
    "busy": "bold green", "idle": "green", "running": "blue", "paused": "yellow", "waiting": "bright_black",
}  # fmt: skip


def render(screen: Screen) -> RenderableType:
    parts: list[RenderableType] = [_panel(device) for device in screen.devices]
    if not screen.devices and not screen.problems:
        parts.append(Text("No devices: apply a ColocationPolicy that selects nodes.", style="yellow"))
    parts += [Text(f"! {problem}", style="red") for problem in screen.problems]
    return Group(*parts)


def _panel(device: DeviceView) -> Panel:
    title = Text.assemble((device.node, "bold"), " · ", device.device, " · policy ", device.policy or "none")
    return Panel(
        Group(_headline(device), _bar(device), _legend(device), _tenants(device.tenants)),
        title=title, title_align="left", box=box.ROUNDED, padding=(0, 1),
    )  # fmt: skip


def _headline(device: DeviceView) -> Text:
    text = Text("offline ")
    if device.paused:
        text.append("paused", "bold yellow")
        if device.why:
            text.append(f" ({device.why})")
    else:
        text.append("running", "bold blue")
    if device.p99_us is not None and device.p50_us is not None:
        text.append(f"   preemption p50 {device.p50_us:.0f} µs, p99 {device.p99_us:.0f} µs")
    text.append(f"   {device.preemptions} preemptions, {device.reclaims} reclaims")
    return text


def _parts(device: DeviceView) -> list[tuple[str, int]]:
    """What the memory is used for, in the order of the bar; adds up to the device."""
    reserved = min(device.free_bytes, device.reservation_bytes)
    return [
        ("online", device.held_bytes("online")),
        ("offline", device.held_bytes("offline")),
        ("kept for online", reserved),
        ("free", max(0, device.free_bytes - reserved)),
    ]


def _bar(device: DeviceView) -> Text:
    bar = Text()
    for (name, _), cells in zip(_parts(device), cells_of([size for _, size in _parts(device)]), strict=True):
        bar.append("█" * cells if name != "free" else "·" * cells, _STYLES[name])
    return bar


def cells_of(sizes: Sequence[int], cells: int = BAR_CELLS) -> list[int]:
    """Share `cells` out by size: what is not nothing gets at least one, and all are given out."""
    total = sum(sizes)
    if total == 0:
        return [0] * (len(sizes) - 1) + [cells]
    shares = [max(1, size * cells // total) if size else 0 for size in sizes]
    largest = max(range(len(sizes)), key=lambda index: sizes[index])
    shares[largest] += cells - sum(shares)
    return shares


def _legend(device: DeviceView) -> Text:
    text = Text()
    for name, size in _parts(device):
        if size:
            text.append("■ ", _STYLES[name]).append(f"{name} {format_quantity(size)}   ")
    return text.append(f"of {format_quantity(device.memory_bytes)}")


def _tenants(tenants: Sequence[TenantView]) -> RenderableType:
    if not tenants:
        return Text("no tenants", style="bright_black")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name, justify in (("TENANT", "left"), ("WORKLOAD", "left"), ("STATE", "left")):
        table.add_column(name, justify=justify, no_wrap=name != "TENANT")  # type: ignore[arg-type]
    for name in ("MEMORY", "LIMIT", "PROCS", "TOKENS/S"):
        table.add_column(name, justify="right", no_wrap=True)
    for tenant in tenants:
        rate = "-" if tenant.tokens_per_s is None else f"{tenant.tokens_per_s:.0f}"
        table.add_row(
            Text(tenant.name), Text(tenant.workload, _STYLES[tenant.workload]),
            Text(tenant.state, _STATE_STYLES[tenant.state]), format_quantity(tenant.memory_bytes),
            format_quantity(tenant.limit_bytes), str(tenant.processes), rate,
        )  # fmt: skip
    return table
