# SPDX-License-Identifier: Apache-2.0
"""A JSON document from a Unix socket of this node: whoever connects gets it whole, and the end of the file.

Why it exists: so the agent tells its status and the device plugin its ledger, and three programs ask.

Threading model: waits up to its timeout. Callers: valve_cli.status, the device plugin, the agent (ledger.py).
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

BYTES_MAX = 16 << 20


def read_json(address: Path, timeout_s: float) -> Any:
    """Raises OSError (nobody listens, no right, too slow) or ValueError (no whole document, or too large)."""
    deadline = time.monotonic() + timeout_s
    data = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(timeout_s)
        client.connect(str(address))
        while chunk := client.recv(1 << 16):
            data += chunk
            client.settimeout(max(0.001, deadline - time.monotonic()))
            if len(data) > BYTES_MAX:
                raise ValueError(f"it sends more than {BYTES_MAX >> 20} MiB")
    return json.loads(data)
