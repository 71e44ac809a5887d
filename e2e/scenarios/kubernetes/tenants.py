# SPDX-License-Identifier: Apache-2.0
"""Pods that run the real engines, mounted from this machine instead of imported as gigabytes of image.

The image holds nothing but the links of a merged /usr; the machine's /usr, its Python, the engines'
environment and the model are mounted read-only at the paths they have here. Everything else is what a user
writes: a command, an annotation.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from e2e.cluster.images import small
from e2e.cluster.processes import wait_for
from valve_cli.demo.loadgen import tokens_of

ROOT = Path(__file__).resolve().parents[3]
ENGINES, MODEL = ROOT / "build/engines", ROOT / "build/model"
PROGRAMS = Path(__file__).with_name("programs")
PORT = 8000
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HOME": "/tmp",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip


@cache
def machine_folders() -> tuple[str, ...]:
    """What an engine needs of this machine: /usr, and Python, engines and model where they lie elsewhere."""
    base = subprocess.run(
        [ENGINES / "bin/python", "-c", "import sys; print(sys.base_prefix)"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    return ("/usr", base, str(ENGINES.resolve()), str(MODEL.resolve()), str(PROGRAMS))


def mounted(folders: Iterable[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(volumeMounts, volumes) that show folders of this machine, /usr among them, at the paths they have."""
    mounts, volumes = [], []
    for number, place in enumerate(dict.fromkeys(folders)):
        if place.startswith("/usr/"):
            continue  # it is there
        mounts.append({"name": f"host-{number}", "mountPath": place, "readOnly": True})
        volumes.append({"name": f"host-{number}", "hostPath": {"path": place, "type": "Directory"}})
    return mounts, volumes


def pod(namespace: str, name: str, command: list[str], annotations: Mapping[str, str]) -> dict[str, Any]:
    mounts, volumes = mounted(machine_folders())
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "annotations": dict(annotations)},
        "spec": {
            "terminationGracePeriodSeconds": 2, "restartPolicy": "Never",
            "containers": [{
                "name": "engine", "image": small.HOST, "command": command,
                "env": [{"name": key, "value": value} for key, value in ENVIRONMENT.items()],
                "volumeMounts": [*mounts, {"name": "shm", "mountPath": "/dev/shm"}],
            }],
            "volumes": [*volumes, {"name": "shm", "emptyDir": {"medium": "Memory"}}],
        },
    }  # fmt: skip


def batch_command(*options: str) -> list[str]:
    python, model = ENGINES.resolve() / "bin/python", MODEL.resolve()
    return [str(python), "-P", str(PROGRAMS / "batch.py"), "--model", str(model), *options]


def taker_command(slabs: int) -> list[str]:
    return [str(ENGINES.resolve() / "bin/python"), "-P", str(PROGRAMS / "taker.py"), str(slabs)]


def serve_command() -> list[str]:
    return [
        str(ENGINES.resolve() / "bin/vllm"), "serve", str(MODEL.resolve()), "--served-model-name", "m",
        "--host", "0.0.0.0", "--port", str(PORT), "--dtype", "bfloat16", "--enforce-eager",
        "--block-size", "32", "--max-model-len", "1024", "--max-num-seqs", "16", "--no-enable-prefix-caching",
    ]  # fmt: skip


@cache
def reference_tokens() -> list[list[int]]:
    """What the batch's prompts give without Valve, on this machine."""
    done = subprocess.run(
        batch_command("--rounds", "1"),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **ENVIRONMENT},
    )
    tokens: list[list[int]] = json.loads(done.stdout.splitlines()[-1])["tokens"]
    return tokens


@dataclass(frozen=True)
class Token:
    """A streamed token of a completion, and when it came (CLOCK_MONOTONIC, s)."""

    id: int
    at_s: float


def complete(address: str, tokens: int, prompt: str = "Tell me a story about the sea.") -> Iterator[Token]:
    """A streamed completion of exactly `tokens` tokens. Raises AssertionError when the server refuses,
    ValueError when it gives up in the middle.

    A server that lags behind its engine sends several tokens at once: they are told one by one.
    """
    connection = http.client.HTTPConnection(address, PORT, timeout=120)
    body = {
        "model": "m",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    try:
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if data and data != "[DONE]":
                now_s = time.monotonic()
                yield from (Token(id, now_s) for id in tokens_of(json.loads(data)))
    finally:
        connection.close()


def serving(address: str) -> bool:
    connection = http.client.HTTPConnection(address, PORT, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


class Load:
    """Online requests, one after the other, from entering to leaving the context."""

    def __init__(self, address: str, tokens: int = 12) -> None:
        self._address, self._tokens = address, tokens
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self.answered = 0
        self.failures: list[str] = []

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                count = sum(1 for _ in complete(self._address, self._tokens))
                if count != self._tokens:
                    self.failures.append(f"{count} of {self._tokens} tokens")
                self.answered += 1
            except (OSError, ValueError, AssertionError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
            self._stop.wait(0.2)

    def more(self, count: int = 2) -> None:
        """Wait until so many further requests have been answered, or one failed."""
        wanted = self.answered + count
        wait_for(f"{count} more answers", lambda: self.answered >= wanted or bool(self.failures), 60)
