# SPDX-License-Identifier: Apache-2.0
"""Peers that are wrong, hostile or slow harm themselves only, and hear what to do."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live import SLABS, hold

from valve_agent import wire
from valve_cli.bench.rig import LiveAgent, LiveTenant, valve_run, wait_for

CONNECTIONS = 100_000
"""Each is refused at its first bad frame."""
SEED = 20261121


class Client:
    """A raw connection of this very process."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(10)
        self.sock.connect(str(path))

    def send(self, frame: wire.Frame, fds: tuple[int, ...] = ()) -> None:
        wire.send(self.sock, frame, fds)

    def recv(self) -> wire.Frame:
        frame, fds = wire.recv(self.sock)
        for fd in fds:
            os.close(fd)
        return frame

    def rejected(self) -> wire.Reject:
        """The REJECT that must come, and the end of the connection after it."""
        frame = self.recv()
        assert isinstance(frame, wire.Reject), frame
        with pytest.raises((wire.ConnectionClosed, ConnectionResetError)):
            self.recv()
        return frame

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def connect(agent: LiveAgent) -> Iterator[Callable[[], Client]]:
    clients: list[Client] = []

    def open_one() -> Client:
        clients.append(Client(agent.socket))
        return clients[-1]

    yield open_one
    for client in clients:
        client.close()


def tenant_frame(role: int = wire.Role.ONLINE, **fields: object) -> wire.Tenant:
    return wire.Tenant(**{"version_min": 1, "version_max": 1, "role": role, "name": b"raw", **fields})


def hello_frame(role: int = wire.Role.ONLINE, **fields: object) -> wire.Hello:
    return wire.Hello(
        **{"version_min": 1, "version_max": 1, "role_claimed": role, "main_pid": os.getpid(), **fields}
    )


def test_a_process_of_no_tenant_is_refused(connect: Callable[[], Client]) -> None:
    client = connect()
    client.send(hello_frame())
    answer = client.rejected()
    assert answer.code == wire.RejectCode.EIDENTITY
    assert "valve run" in answer.sentence


def test_a_role_that_the_tenant_does_not_have_is_refused(connect: Callable[[], Client]) -> None:
    launcher, liar = connect(), connect()
    launcher.send(tenant_frame(wire.Role.ONLINE))
    assert isinstance(launcher.recv(), wire.TenantOk)
    liar.send(hello_frame(wire.Role.OFFLINE))
    answer = liar.rejected()
    assert answer.code == wire.RejectCode.EROLE
    assert "says it is offline" in answer.sentence
    assert "is online" in answer.sentence


@pytest.mark.parametrize(
    ("what", "main_pid", "sentence"),
    [
        ("another process than its parent", os.getpid(), "but its parent is"),
        ("its parent, whose memory is not its own", os.getppid(), "their memory differs"),
    ],
)
def test_a_false_helper_is_refused(
    connect: Callable[[], Client], what: str, main_pid: int, sentence: str
) -> None:
    """A helper is never stopped, so only an address-space helper may be one."""
    launcher, liar = connect(), connect()
    launcher.send(tenant_frame())
    launcher.recv()
    liar.send(hello_frame(flags=wire.HelloFlag.HELPER, main_pid=main_pid))
    answer = liar.rejected()
    assert answer.code == wire.RejectCode.EIDENTITY
    assert sentence in answer.sentence


def test_a_tenant_process_that_claims_another_role_hears_a_sentence(
    agent: LiveAgent, start: Callable[..., LiveTenant], runtime: Path
) -> None:
    """End to end: the command under an offline `valve run` sets VALVE_WORKLOAD=online for itself."""
    attach = "from valve_runtime import _lib; v = _lib.load(); print(v.attach(3000), v.last_error())"
    command = valve_run(
        agent.socket, runtime, "offline", "liar",
        ["env", "VALVE_WORKLOAD=online", sys.executable, "-c", attach],
    )  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "says it is online" in done.stdout + done.stderr
    assert [event for event in agent.events("attach") if event["role"] == "online"] == []


@pytest.mark.parametrize("frame", [tenant_frame, hello_frame], ids=["launcher", "runtime"])
def test_another_protocol_version_is_refused(
    connect: Callable[[], Client], frame: Callable[..., wire.Frame]
) -> None:
    client = connect()
    client.send(frame(version_min=7, version_max=9))
    answer = client.rejected()
    assert answer.code == wire.RejectCode.EVERSION
    assert "7..9" in answer.sentence
    assert "same version" in answer.sentence


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
def test_another_user_may_not_register_a_tenant(agent: LiveAgent) -> None:
    script = (
        "import os, socket, sys; from valve_agent import wire; os.chdir('/'); os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1])\n"
        "wire.send(s, wire.Tenant(version_min=1, version_max=1, role=1)); print(wire.recv(s)[0].sentence)\n"
    )
    for folder in (agent.folder, *agent.folder.parents):
        if folder != Path("/tmp") and folder.is_relative_to("/tmp"):
            folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", script, str(agent.socket)], capture_output=True, text=True, timeout=30
    )
    assert "may not register" in done.stdout, done.stderr


def test_a_second_first_frame_is_a_protocol_error(connect: Callable[[], Client]) -> None:
    client = connect()
    client.send(tenant_frame())
    assert isinstance(client.recv(), wire.TenantOk)
    client.send(tenant_frame())
    assert "TENANT is not expected now" in client.rejected().sentence


@pytest.mark.parametrize(
    ("what", "sizes", "sentence"),
    [
        ("a file of the right size that is no memory file", None, "memory file"),
        ("an arena that is too small", (1, 1), "bytes where"),
    ],
)
def test_a_forged_arena_is_refused(
    agent: LiveAgent,
    connect: Callable[[], Client],
    tmp_path: Path,
    what: str,
    sizes: tuple[int, int] | None,
    sentence: str,
) -> None:
    launcher, client = connect(), connect()
    launcher.send(tenant_frame())
    launcher.recv()
    client.send(hello_frame(arena_slabs=4))
    assert isinstance(client.recv(), wire.Welcome)
    fds = []
    for index, size in enumerate(sizes or (4 * (2 << 20), 2 << 20)):
        if sizes is None:
            path = Path("/var/tmp") / f"valve-test-{os.getpid()}-{index}"
            fds.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            path.unlink()
        else:
            fds.append(os.memfd_create("forged"))
        os.ftruncate(fds[-1], size)
    fds.append(os.memfd_create("ledger"))
    client.send(wire.ArenaRestore(slabs=4, held=wire.Bitmap.of({0, 1})), tuple(fds))
    answer = client.rejected()
    for fd in fds:
        os.close(fd)
    assert answer.code == wire.RejectCode.EARENA
    assert sentence in answer.sentence
    assert agent.status()["slabs"]["free"] == SLABS


def test_a_peer_that_never_reads_is_dropped_and_nobody_waits(
    agent: LiveAgent, connect: Callable[[], Client], start: Callable[..., LiveTenant]
) -> None:
    good = start("online", "good", slabs=SLABS)
    launcher, slow = connect(), connect()
    launcher.send(tenant_frame())
    launcher.recv()
    slow.send(hello_frame())
    slow.send(wire.ArenaOpen(slabs=4))
    # Every round is answered by a GRANT that nobody reads.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(20_000):
            slow.send(wire.Want(total=4))
            slow.send(wire.Return(set=wire.Bitmap.of({0, 1, 2, 3})))
    wait_for("it to be dropped", lambda: [e for e in agent.events("detach") if "does not read" in e["why"]])
    assert len(good.ask("take", slabs=5)["held"]) == 5


def mutations(rng: random.Random) -> Iterator[list[bytes]]:
    """Endless packets of one connection each: random, truncated, oversized, bit-flipped, out of order."""
    openings = [
        bytes(hello_frame()),
        bytes(tenant_frame()),
        bytes(hello_frame(flags=1)),
        bytes(hello_frame(main_pid=1)),
    ]
    classes = list(wire.FRAMES.values())
    while True:
        packets = []
        if rng.random() < 0.3:
            packets.append(rng.choice(openings))
        for _ in range(rng.randrange(1, 6)):
            kind = rng.randrange(5)
            frame = bytearray(bytes(rng.choice(classes)()))
            if kind == 0:
                frame = bytearray(rng.randbytes(rng.randrange(0, 700)))
            elif kind == 1:
                frame = frame[: rng.randrange(len(frame))]
            elif kind == 2:
                frame += rng.randbytes(rng.choice([1, 7, 600, 5000, 70_000]))
            elif kind == 3:
                for _ in range(rng.randrange(1, 4)):
                    frame[rng.randrange(min(len(frame), 40))] ^= 1 << rng.randrange(8)
            else:
                frame[16:] = rng.randbytes(len(frame) - 16)
                struct.pack_into("<I", frame, 8, rng.choice([0, 16, len(frame), 2**32 - 1]))
            packets.append(bytes(frame))
        yield packets


def test_a_hundred_thousand_bad_frames_disturb_nobody(
    agent: LiveAgent, start: Callable[..., LiveTenant], connect: Callable[[], Client]
) -> None:
    """This process is a registered online tenant meanwhile, so that frames also get past the first door."""
    offline, online = start("offline", "off", slabs=30), start("online", "good", slabs=30)
    launcher = connect()
    launcher.send(tenant_frame())
    assert isinstance(launcher.recv(), wire.TenantOk)
    hold(offline, 20)
    rng = random.Random(SEED)
    connections = mutations(rng)
    spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
    for number in range(CONNECTIONS):
        if number % (CONNECTIONS // 20) == 0:  # the good tenants are served all the while
            took = online.ask("take", slabs=10)["held"]
            assert len(took) == 10
            online.ask("busy")
            online.ask("idle")
            online.ask("want", slabs=0)
            assert online.ask("return", slabs=took)["returned"] == took
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(10)
        sock.connect(str(agent.socket))
        with sock:
            try:
                for packet in next(connections):
                    if rng.random() < 0.02:
                        socket.send_fds(sock, [packet or b"x"], spare[: rng.randrange(1, 5)])
                    else:
                        sock.send(packet)
            except OSError:
                continue  # the agent has closed this connection already
    for fd in spare:
        os.close(fd)
    status = agent.status()
    assert status["pid"] == agent.pid
    assert status["rejects"] > CONNECTIONS * 0.9, "a few packets are good by chance"
    assert status["killed"] == 0
    assert status["gate"]["kills"] == 0
    assert [event for event in agent.events("detach") if event["pid"] != os.getpid()] == []
    assert status["tenants"]["off"]["held_slabs"] == 20
    wait_for("nothing to leak", lambda: len(os.listdir(f"/proc/{agent.pid}/fd")) < 80)
