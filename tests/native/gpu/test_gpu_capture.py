# SPDX-License-Identifier: Apache-2.0
"""What libvalve captures is what the driver has, in every form in which a process can say it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from gpu_captured import RAW, Captured
from victims import build, compile_program, sanitizer_environment, unrandomized

import fakenv
from valve_agent import wire

NewCaptured = Callable[..., Captured]
CHANNEL = "rm.CHANNEL, bytes(368)"


@pytest.fixture
def new_captured(new_machine: fakenv.NewMachine, library: Path, tmp_path: Path) -> Iterator[NewCaptured]:
    with ExitStack() as stack:

        def make(device: wire.Device = wire.Device.NVIDIA, **options: str | int) -> Captured:
            made = Captured(new_machine(**options), library, tmp_path, device)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def captured(new_captured: NewCaptured) -> Captured:
    made = new_captured()
    made.run(RAW)
    return made


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("the short form", ""),
        ("the long form", "wide=True"),
        ("the short form through the transfer escape", "xfer=True"),
        ("the long form through the transfer escape", "wide=True, xfer=True"),
        ("a handle that the process chooses", "handle=0x12345678"),
        ("such a handle, long, transferred", "handle=0x12345678, wide=True, xfer=True"),
    ],
)
def test_every_form_of_an_allocation(captured: Captured, what: str, options: str) -> None:
    status, handle = captured.run(f"result = c.alloc(t['tsg'], {CHANNEL}, {options})")  # type: ignore[misc]
    assert status == 0, what
    (channel,) = captured.channels()
    tree = captured.run("result = [c.handle, t['subdevice'], t['tsg']]")
    assert [channel.client, channel.subdevice, channel.group] == tree, what
    assert (channel.channel, channel.engine, channel.computes) == (handle, 1, True), what
    assert captured.files[channel.file][0] == wire.GpuFileKind.CTL, "the file came before the channel"
    assert captured.agrees()


@pytest.mark.parametrize("branch", fakenv.LAYOUTS)
def test_a_cuda_context_in_every_layout(new_captured: NewCaptured, branch: str) -> None:
    captured = new_captured(branch=branch)
    captured.run("import driver_api; cu = driver_api.Cuda()")
    assert captured.agrees()
    assert sorted(channel.engine for channel in captured.channels()) == [1] * 8 + [9, 10]
    assert all(channel.subdevice and channel.group for channel in captured.channels())
    captured.run("for _ in range(3): cu.stream()")
    assert captured.agrees()


@pytest.mark.parametrize(
    ("what", "code", "left", "closed"),
    [
        ("a channel", "c.free(made[0])", 2, False),
        ("a group with its channels", "c.free(t['tsg'])", 0, False),
        ("the device with all below", "c.free(t['device'])", 0, False),
        ("the client", "c.free(c.handle)", 0, False),
        ("a handle that does not exist", "c.free(0x777)", 3, False),
        ("an allocation that fails", f"c.alloc(t['tsg'], {CHANNEL}, handle=made[0])", 3, False),
        ("the last descriptor of the file", "os.close(c.fd)", 0, True),
        ("one of two descriptors", "other = os.dup(c.fd); os.close(c.fd); c.fd = other", 3, False),
        ("both of two", "other = os.dup(c.fd); os.close(c.fd); os.close(other)", 0, True),
        ("a descriptor that another file takes", "os.dup2(os.open('/dev/null', os.O_RDONLY), c.fd)", 0, True),
        ("all descriptors above it", "os.closerange(c.fd, c.fd + 1)", 0, True),
    ],
)
def test_what_is_gone_is_not_listed(
    captured: Captured, what: str, code: str, left: int, closed: bool
) -> None:
    captured.run(f"made = [c.alloc(t['tsg'], {CHANNEL})[1] for _ in range(3)]")
    assert len(captured.channels()) == 3
    captured.run(code)
    captured.frames()
    assert len(captured.channels()) == left, what
    assert bool(captured.gone) == closed, "the agent hears of a closed file, and of no other"
    if "device with" not in what and "group with" not in what:
        assert captured.agrees(), what


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("a child by vfork that closes all it has", "r = subprocess.run(['/bin/true'])"),
        ("one that opens and replaces files", "r = subprocess.run(['/bin/true'], stdin=subprocess.DEVNULL)"),
        ("one by fork", "r = subprocess.run(['/bin/true'], preexec_fn=lambda: os.close(c.fd))"),
    ],
)
def test_what_a_child_closes_is_still_listed(captured: Captured, what: str, code: str) -> None:
    captured.run(f"import subprocess; made = [c.alloc(t['tsg'], {CHANNEL})[1] for _ in range(3)]")
    before = captured.channels()
    captured.actor.start(f"{code}; result = r.returncode")
    served = 0
    while not captured.answered():
        with contextlib.suppress(TimeoutError):
            link = captured.agent.accept(timeout_s=0.05)
            link.welcome(wire.Role.OFFLINE, device=wire.Device.CPU)
            served += 1
        captured.frames(for_s=0.01)
    assert captured.finish() == 0
    assert served >= 1, "it was a process under libvalve"
    captured.frames()
    assert (captured.gone, len(captured.files)) == ([], 1), what
    assert captured.channels() == before, what
    captured.run(f"made.append(c.alloc(t['tsg'], {CHANNEL})[1]); c.free(made[0]); os.close(os.dup(c.fd))")
    assert len(captured.channels()) == 3
    assert captured.agrees(), what
    captured.run("os.close(c.fd)")
    captured.frames()
    assert (captured.channels(), len(captured.gone)) == ([], 1), "its own close is still seen"


def test_a_handle_used_again_is_a_new_channel(captured: Captured) -> None:
    for _ in range(50):
        captured.run(f"h = c.alloc(t['tsg'], {CHANNEL}, handle=0x99)[1]; c.free(h)")
        assert captured.channels() == []
    captured.run(f"c.alloc(t['tsg'], {CHANNEL}, handle=0x99)")
    assert [channel.channel for channel in captured.channels()] == [0x99]


def test_the_engine_of_the_group_counts(captured: Captured) -> None:
    captured.run(f"""
        import struct
        copies = c.alloc(t['device'], rm.TSG, struct.pack('5I', 0, 0, 0, 9, 0), wide=True)[1]
        c.alloc(copies, {CHANNEL})
        alone = bytearray(368); alone[128] = 10
        c.alloc(t['device'], rm.CHANNEL, bytes(alone))
    """)
    assert sorted((channel.engine, bool(channel.group)) for channel in captured.channels()) == [
        (9, True),
        (10, False),
    ]


def test_several_clients_on_several_files(captured: Captured) -> None:
    captured.run("more = [rm.Client() for _ in range(3)]; trees = [m.tree(channels=2) for m in more]")
    found = captured.channels()
    assert captured.agrees()
    assert len({channel.client for channel in found}) == 3
    assert len({channel.file for channel in found}) == 3
    captured.run("os.close(more[1].fd)")
    assert len({channel.client for channel in captured.channels()}) == 2


def test_channels_wait_until_the_agent_has_the_file(captured: Captured) -> None:
    captured.actor.start(f"result = c.alloc(t['tsg'], {CHANNEL})[0]")
    captured.frames(take=False, for_s=0.2)
    assert len(captured.files) == 1
    assert not captured.answered(), "a channel that nobody can pause must not exist"
    assert captured.driver() == []
    captured.at().take(*captured.files)
    assert captured.finish() == 0


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("a new channel", f"c.alloc(t['tsg'], {CHANNEL})[0]"),
        ("scheduling its group", "c.control(t['tsg'], rm.TSG_SCHEDULE, bytes([1, 0, 0]))[0]"),
        ("enabling channels itself", "c.disable(t['subdevice'], made, on=False)"),
    ],
)
def test_what_could_start_work_waits_while_paused(captured: Captured, what: str, call: str) -> None:
    captured.run(f"made = [c.alloc(t['tsg'], {CHANNEL})[1]]")
    captured.hold()
    captured.actor.start(f"result = {call}")
    assert captured.waits(), what
    assert len(captured.driver()) == 1
    captured.let_go()
    assert captured.finish() == 0


def test_other_calls_go_on_while_paused(captured: Captured) -> None:
    captured.run(f"made = [c.alloc(t['tsg'], {CHANNEL})[1]]")
    captured.hold()
    assert captured.run("result = c.control(t['tsg'], rm.GET_TIMESLICE, bytes(8))[0]") == 0
    assert captured.run("result = c.free(made[0])") == 0
    assert captured.channels() == []


def test_on_a_cpu_agent_nothing_waits_and_nothing_is_left_open(new_captured: NewCaptured) -> None:
    captured = new_captured(wire.Device.CPU)
    before = captured.run(
        "result = sorted(map(int, os.listdir('/proc/self/fd')))".replace("os.", "__import__('os').")
    )
    captured.run(RAW)
    assert captured.run(f"result = c.alloc(t['tsg'], {CHANNEL})[0]") == 0
    assert max(before) < 700  # type: ignore[call-overload]


def test_threads_that_make_and_free(captured: Captured) -> None:
    captured.run(f"""
        def work(n):
            mine = []
            for i in range(40):
                mine.append(c.alloc(t['tsg'], {CHANNEL})[1])
                if i % 3 == n % 3: c.free(mine.pop(0))
            kept.append(mine)
        kept = []
        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for x in threads: x.start()
        for x in threads: x.join()
    """)
    assert len(captured.driver()) > 100
    assert captured.agrees()


def test_under_the_sanitizers(
    new_machine: fakenv.NewMachine, sanitized: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of everything above: the sanitizers would end it."""
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0:exitcode=99")
    captured = Captured(new_machine(), sanitized, tmp_path, wire.Device.NVIDIA)
    try:
        captured.run(RAW)
        captured.run(f"made = [c.alloc(t['tsg'], {CHANNEL}, xfer=True)[1] for _ in range(1015)]")
        captured.run(f"late = [c.alloc(t['tsg'], {CHANNEL}, wide=True)[1] for _ in range(10)]")
        assert captured.at().overflow == 5
        captured.run("[c.free(h) for h in made[::2]]; other = os.dup(c.fd); os.close(c.fd); c.fd = other")
        captured.run("import driver_api; cu = driver_api.Cuda(); cu.launch('nop'); cu.synchronize()")
        captured.hold()
        captured.actor.start(f"result = c.alloc(t['tsg'], {CHANNEL})[0]")
        assert captured.waits()
        captured.let_go()
        assert captured.finish() == 0
        assert captured.run("result = c.free(t['device'])") == 0
        assert sorted(channel.engine for channel in captured.channels()) == [1] * 8 + [9, 10]
        assert captured.run("os.close(c.fd); result = len(os.listdir('/proc/self/fd'))")
        captured.frames()
        assert len(captured.gone) == 1
        assert captured.actor.process.poll() is None
    finally:
        captured.close()


def test_tables_between_two_threads(tmp_path: Path) -> None:
    """What is being freed is not listed, and a number is not given away while the agent holds it."""
    source = Path(__file__).with_name("tables.c")
    program = compile_program(tmp_path / "tables", source, *map(str, build.sources()), sanitize="address")
    environment = {**os.environ, **sanitizer_environment()}
    done = subprocess.run(unrandomized([str(program)]), env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "made: first second",
        "both under way:",
        "the device refused: second",
        "the channel refused: first second",
        "number 0",
        "while taken 1",
        "let go 0",
    ]


def test_a_library_loaded_late_is_seen(new_captured: NewCaptured) -> None:
    captured = new_captured()
    captured.run("import ctypes")
    assert captured.channels() == []
    captured.run("import driver_api; cu = driver_api.Cuda()")
    assert len(captured.channels()) == 10


def test_a_forked_child_has_a_table_of_its_own(captured: Captured) -> None:
    captured.run(f"made = [c.alloc(t['tsg'], {CHANNEL})[1]]")
    captured.actor.start("""
        r, w = os.pipe()
        child = os.fork()
        if child == 0:
            other = rm.Client(); other.tree(channels=2)
            os.write(w, b'x'); os.read(r, 1) if False else __import__('time').sleep(60)
        result = os.read(r, 1).decode()
    """)
    link = captured.agent.accept()
    link.welcome(wire.Role.OFFLINE, device=wire.Device.NVIDIA)
    link.expect(wire.GpuTable)
    from valve_agent.devices.nvidia.table import GpuTable

    table = GpuTable(link.fds[0])
    table.hold = 0
    table.take(link.expect(wire.GpuFile).number)
    assert captured.finish() == "x"
    assert len(captured.channels()) == 1, "the parent's table knows nothing of the child's"
    assert len(table.read()[1]) == 2
    captured.actor.run("os.kill(child, 9); os.waitpid(child, 0)")
    table.close()
    link.close()


def test_the_next_agent_gets_everything_while_the_process_is_stopped(captured: Captured) -> None:
    captured.run("more = rm.Client(); other = more.tree(channels=3)")
    listed = captured.channels()
    captured.reconnect()
    os.kill(captured.actor.pid, 0)
    captured.welcome()
    captured.frames(for_s=0.3)
    assert captured.channels() == listed
    assert [kind for kind, _ in captured.files.values()] == [wire.GpuFileKind.CTL]
    os.kill(captured.actor.pid, signal.SIGCONT)
    assert captured.run("result = more.control(other['tsg'], rm.GET_TIMESLICE, bytes(8))[0]") == 0
