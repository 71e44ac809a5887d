# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus that scrapes real agents, for as long as a test needs it."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from e2e.cluster.control_plane import free_ports
from valve_cli.bench.rig import wait_for

SCRAPE_S = 1


class Prometheus:
    """Scrapes `targets` (node name -> port on loopback) every second. Use as a context manager."""

    def __init__(self, programs: Path, folder: Path, targets: Mapping[str, int]) -> None:
        (self.port,) = free_ports(1)
        self._folder = folder
        config = {
            "global": {"scrape_interval": f"{SCRAPE_S}s"},
            "scrape_configs": [
                {
                    "job_name": "valve-agent",
                    "static_configs": [
                        {"targets": [f"127.0.0.1:{port}"], "labels": {"node": node}}
                        for node, port in targets.items()
                    ],
                }
            ],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        self._command = [
            str(programs / "prometheus"), f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{self.port}",
            "--log.level=warn",
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with (self._folder / "prometheus.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder
            )
        wait_for("Prometheus to be ready", self._ready)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "prometheus.log").read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def query(self, expr: str, at: float | None = None) -> list[dict[str, Any]]:
        """Instant vector: [{metric, value: [t, "v"]}]."""
        return self._ask("query", {"query": expr, "time": str(at or time.time())})

    def query_range(self, expr: str, start: float, end: float, step_s: float) -> list[dict[str, Any]]:
        """Matrix: [{metric, values: [[t, "v"], …]}]."""
        options = {"query": expr, "start": str(start), "end": str(end), "step": str(step_s)}
        return self._ask("query_range", options)

    def _ask(self, what: str, options: Mapping[str, str]) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{self.port}/api/v1/{what}?{urllib.parse.urlencode(options)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                document = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{options['query']}: {error.read().decode()}") from None
        result = document["data"]["result"]
        assert isinstance(result, list)
        return result
