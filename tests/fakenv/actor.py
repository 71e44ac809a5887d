# SPDX-License-Identifier: Apache-2.0
"""The other end of fakenv.Actor: executes each message in one namespace and answers. argv[1] is the
descriptor of the socket. The modules `rm` and `driver_api` beside this file can be imported by the code."""

import json
import socket
import sys
import traceback


def main() -> None:
    link = socket.socket(fileno=int(sys.argv[1]))
    names: dict[str, object] = {}
    while True:
        code, fds, _, _ = socket.recv_fds(link, 1 << 20, 8)
        if not code:
            return
        names.update(result=None, give=[], fds=fds)
        try:
            exec(compile(code, "<test>", "exec"), names)
            answer = json.dumps({"result": names["result"]})
        except Exception:  # noqa: BLE001 -- the test gets it, with its traceback
            names["give"] = []
            answer = json.dumps({"error": traceback.format_exc()})
        given = names["give"]
        assert isinstance(given, list)
        socket.send_fds(link, [answer.encode()], given)


if __name__ == "__main__":
    main()
