# SPDX-License-Identifier: Apache-2.0
"""`valve demo`: the command line, the order of the phases, and the exit status.

This is the demo's `main`: the environment is read here and handed down.  One asyncio loop;
SIGINT and SIGTERM cancel it, and every process is taken down on the way out.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from rich.console import Console

from valve_api.errors import PolicyError
from valve_api.load import load_policy
from valve_cli.demo import facts, measure, summary
from valve_cli.demo.display import shown
from valve_cli.demo.engines import engine_environment
from valve_cli.demo.errors import DemoError
from valve_cli.demo.page import write_html
from valve_cli.demo.phases import PhaseRecord, Phases, start_pair
from valve_cli.demo.progress import Progress
from valve_cli.demo.report import Load, Phase, Report, ValvePhase
from valve_cli.demo.report import Phases as PhasesReport
from valve_cli.demo.settings import PHASES, OfflineLoad, Settings
from valve_cli.demo.trace import Arrival, load, stretch
from valve_cli.demo.valve_phase import valve_phase

SHIPPED_TRACE = Path(__file__).with_name("data") / "azure_conv_2023_first_1500.csv"
TRACE_LICENCE = "Azure LLM inference trace 2023 (conversation), Microsoft, CC-BY-4.0"
QUICK_REQUESTS = 24
FAULTS = ("drop-lost",)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="valve demo",
        description="Two real LLM engines share one device: an online server that replays a production"
        " trace and an offline batch, first each alone, then together without Valve, then with Valve."
        " Writes report.json and report.html.",
    )
    p.add_argument(
        "--policy", type=Path, default=Path("examples/demo.yaml"), help="ColocationPolicy (%(default)s)"
    )
    p.add_argument("--model", type=Path, default=Path("build/model"), help="model folder (%(default)s)")
    p.add_argument("--out", type=Path, default=Path("out/demo"), help="where the report goes (%(default)s)")
    p.add_argument(
        "--engine-python",
        type=Path,
        default=Path("build/engines/bin/python"),
        help="Python of the environment that has vLLM (%(default)s)",
    )
    p.add_argument(
        "--runtime",
        type=Path,
        default=Path("build/runtime"),
        help="libvalve and the engine plugins (%(default)s)",
    )
    p.add_argument(
        "--phases", default=",".join(PHASES), help="which phases to run, comma separated (%(default)s)"
    )
    p.add_argument("--requests", type=int, help="online requests per phase")
    p.add_argument("--quick", action="store_true", help="a short look: few requests, small batch")
    p.add_argument(
        "--trace", type=Path, default=SHIPPED_TRACE, help="Azure 2023 csv, BurstGPT csv or Mooncake jsonl"
    )
    p.add_argument("--trace-start", type=float, help="seconds of trace to leave out at its beginning")
    p.add_argument("--time-scale", type=float, help="seconds replayed per second of trace")
    p.add_argument("--context-scale", type=float, help="factor on the trace's prompt lengths")
    p.add_argument("--output-scale", type=float, help="factor on the trace's output lengths")
    p.add_argument("--sequences", type=int, help="requests kept in the offline engine")
    p.add_argument("--fault", choices=FAULTS, default="", help=argparse.SUPPRESS)
    return p


def settings_from(args: argparse.Namespace) -> Settings:
    """Check what the user gave and make the run's settings.  Raises DemoError, PolicyError."""
    phases = tuple(name.strip() for name in args.phases.split(",") if name.strip())
    wrong = [name for name in phases if name not in PHASES]
    if wrong or not phases:
        raise DemoError(f"--phases {args.phases!r}: choose from {', '.join(PHASES)}")
    if args.requests is not None and args.requests < 1:
        raise DemoError(f"--requests {args.requests}: at least 1")
    policy = load_policy(args.policy)
    if policy.spec.cpu_device is None:
        raise DemoError(
            f"{args.policy} has no spec.cpuDevice: the demo runs on the cpu device, see examples/demo.yaml"
        )
    for option, path, hint in (
        ("--engine-python", args.engine_python, "run `make build/engines`"),
        ("--model", args.model / "config.json", "run `make build/model`, or name a model folder"),
    ):
        if not path.exists():
            raise DemoError(f"{option}: there is no {path}; {hint}")
    if "valve" in phases and not args.runtime.exists():
        raise DemoError(f"--runtime: there is no {args.runtime}; run `make runtime`")
    base = Settings(
        model=args.model.absolute(),
        engine_python=args.engine_python.absolute(),
        runtime=args.runtime.absolute(),
        policy=args.policy.absolute(),
        out=args.out.absolute(),
        device_bytes=int(policy.spec.cpu_device.memory),
        slab_bytes=int(policy.spec.memory.slab_size),
        trace=args.trace,
        phases=tuple(name for name in PHASES if name in phases),
        fault=args.fault,
    )
    scaling = dataclasses.replace(
        base.scaling,
        **{
            name: value
            for name, value in (
                ("time", args.time_scale),
                ("context", args.context_scale),
                ("output", args.output_scale),
            )
            if value is not None
        },
    )
    offline = base.offline
    if args.quick:
        offline = OfflineLoad(
            prompts=offline.prompts // 3,
            sequences=offline.sequences,
            exclusive_s=10.0,
            prompt_tokens=offline.prompt_tokens,
            output_tokens=offline.output_tokens,
        )
    if args.sequences is not None:
        offline = dataclasses.replace(offline, sequences=args.sequences)
    return dataclasses.replace(
        base,
        scaling=scaling,
        offline=offline,
        requests=args.requests or (QUICK_REQUESTS if args.quick else base.requests),
        trace_start_s=base.trace_start_s if args.trace_start is None else args.trace_start,
    )


def main(args: Sequence[str]) -> int:
    """Run the demo; 0 if it ran and the report is written, whatever the report says.

    1: something failed (the message names the log).  2: bad command line.  130: interrupted."""
    console = Console(highlight=False)
    options = parser().parse_args(list(args))
    command = shlex.join(["valve", "demo", *args])
    try:
        settings = settings_from(options)
        return asyncio.run(_until_signalled(Demo(settings, command, dict(os.environ), console)))
    except (DemoError, PolicyError) as error:
        console.print(f"valve demo: {error}", style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("valve demo: interrupted; every engine was stopped")
        return 130


async def _until_signalled(demo: Demo) -> int:
    """Run the demo; SIGTERM and SIGINT end it as an interruption, with its clean-up."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(demo.run())
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


class Demo:
    """One run: engines up, phases, engines down, report."""

    def __init__(self, settings: Settings, command: str, env: dict[str, str], console: Console) -> None:
        self._settings = settings
        self._command = command
        self._env = env
        self._engine_env = engine_environment(settings, env)
        self._console = console
        self._records: dict[str, PhaseRecord] = {}
        self._valve: measure.ValveRecord | None = None
        self._engine_info: dict[str, str] = {}

    async def run(self) -> int:
        settings = self._settings
        started, begin = datetime.datetime.now(datetime.UTC), time.monotonic()
        arrivals = settings.scaling.apply(
            stretch(load(settings.trace), settings.trace_start_s, settings.requests)
        )
        if settings.logs.exists():
            shutil.rmtree(settings.logs)
        settings.logs.mkdir(parents=True)
        progress = Progress(steps=("start", *settings.phases))
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(shown(progress, self._console))
            phases = Phases(settings, arrivals, progress)
            await self._without_valve(phases, progress)
            if "valve" in settings.phases:
                self._valve = await valve_phase(
                    settings, self._env, self._engine_env, phases, progress, self._engine_info
                )
                self._records["valve"] = self._valve.phase
        report = self._report(arrivals, started, time.monotonic() - begin)
        (settings.out / "report.json").write_text(report.to_json(), encoding="utf-8")
        self._write_requests(settings.logs / "requests.jsonl")
        page = settings.out / "report.html"
        write_html(page, report, self._records, self._valve, settings.slab_bytes)
        summary.show(report, self._console)
        self._console.print(f"\nreport: {page}\n        {page.with_suffix('.json')}", soft_wrap=True)
        return 0

    async def _without_valve(self, phases: Phases, progress: Progress) -> None:
        """The phases that share one pair of engines without Valve."""
        settings = self._settings
        wanted = [name for name in ("exclusive", "alone", "naive") if name in settings.phases]
        if not wanted:
            return
        progress.begin("start", "both engines load the model", 30.0)
        pair = await start_pair(settings, self._engine_env, "plain", settings.online_static_bytes)
        try:
            self._engine_info.update({k: str(pair.offline.info[k]) for k in ("vllm", "torch")})
            await phases.warm_up(pair)
            for name in wanted:
                self._records[name] = await getattr(phases, name)(pair)
                progress.note(self._one_line(name))
            progress.begin("start", "the engines stop", 5.0)
        finally:
            await pair.stop()

    def _write_requests(self, path: Path) -> None:
        """Every online request of every phase, for whoever wants to look behind the figures."""
        with path.open("w", encoding="utf-8") as lines:
            for name, record in self._records.items():
                for request in record.requests:
                    line = {"phase": name, **dataclasses.asdict(request)}
                    lines.write(json.dumps(line) + "\n")

    def _one_line(self, name: str) -> str:
        phase = measure.phase_report(self._records[name])
        parts = [f"{name}:"]
        if phase.ttft_ms and phase.tpot_ms:
            parts.append(f"TTFT {phase.ttft_ms.mean:.0f} ms, TPOT {phase.tpot_ms.mean:.1f} ms (means),")
            parts.append(f"{phase.online_requests} requests, busy {phase.online_busy_share:.0%}")
        if phase.offline_sequences:
            parts.append(f"offline {phase.offline_tokens_per_s:.0f} tokens/s")
        return " ".join(parts)

    def _report(self, arrivals: Sequence[Arrival], started: datetime.datetime, duration_s: float) -> Report:
        settings = self._settings
        made: dict[str, Phase] = {
            name: measure.phase_report(record) for name, record in self._records.items() if name != "valve"
        }
        valve: ValvePhase | None = None
        if self._valve:
            valve = measure.valve_report(self._valve, self._records.get("exclusive"))
        phases = PhasesReport(**made, valve=valve)
        found = measure.ratios(phases)
        flags = settings.flags
        return Report(
            device="cpu",
            versions=facts.versions(self._engine_info.get("vllm", ""), self._engine_info.get("torch", "")),
            machine=facts.machine(),
            command=self._command,
            started=started.isoformat(timespec="seconds"),
            duration_s=duration_s,
            load=Load(
                trace=settings.trace.name,
                trace_licence=TRACE_LICENCE if settings.trace == SHIPPED_TRACE else "as its publisher says",
                trace_start_s=settings.trace_start_s,
                scaling=settings.scaling.as_dict(),
                online_requests=len(arrivals),
                context_tokens_mean=sum(a.context_tokens for a in arrivals) / len(arrivals),
                output_tokens_mean=sum(a.output_tokens for a in arrivals) / len(arrivals),
                offline_prompts=settings.offline.prompts,
                offline_sequences=settings.offline.sequences,
                offline_prompt_tokens=settings.offline.prompt_tokens,
                offline_output_tokens=settings.offline.output_tokens,
                engine_flags=dataclasses.asdict(flags),
                model=re.sub(
                    r"-[0-9a-f]{12}$", "", settings.model.resolve().name
                ),  # without the cache's hash
                device_memory_bytes=settings.device_bytes,
                memory_note=(
                    f"exclusive: offline has the whole device, {settings.offline.sequences} requests in its"
                    f" engine; naive: a static split, online {settings.online_static_bytes >> 20} MiB of KV,"
                    f" offline its share of requests, {settings.naive_sequences}; valve: elastic, each engine"
                    " may use it all"
                ),
                identity_note=(
                    f"offline runs {flags.offline_dtype}, greedy; every output of the valve phase is compared"
                    " token by token with the exclusive phase's output for the same prompt"
                ),
            ),
            phases=phases,
            valve=valve,
            ratios=found,
            promises=measure.promises(phases, found),
            fault=settings.fault,
        )
