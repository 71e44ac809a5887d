# SPDX-License-Identifier: Apache-2.0
"""A process in a pod that executes what the test says, in one namespace.

    gpu_actor.py PORT

A line of JSON each way: {"code": text} and {"result": the variable `result`} or {"error": traceback}. One
connection after the other, one thread: while a call of the code waits, nothing is answered.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback

sys.path.append(
    os.environ.get("LD_LIBRARY_PATH", "")
)  # the fake driver's `driver_api` lies beside its library


def answer(code: str, names: dict[str, object]) -> dict[str, object]:
    names["result"] = None
    try:
        exec(compile(code, "<test>", "exec"), names)
        return {"result": names["result"]}
    except Exception:  # noqa: BLE001 -- the test gets it, with its traceback
        return {"error": traceback.format_exc()}


def main() -> int:
    names: dict[str, object] = {}
    with socket.create_server(("0.0.0.0", int(sys.argv[1]))) as server:
        while True:
            connection, _ = server.accept()
            with connection, connection.makefile("rw") as link:
                for line in link:
                    print(json.dumps(answer(json.loads(line)["code"], names)), file=link, flush=True)


if __name__ == "__main__":
    sys.exit(main())
