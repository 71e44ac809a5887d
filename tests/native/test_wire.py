# SPDX-License-Identifier: Apache-2.0
"""wire.py and shared.py say what valve_protocol.h says, and take nothing else off a socket."""

from __future__ import annotations

import ctypes
import enum
import fcntl
import os
import random
import re
import socket
import subprocess
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from victims import HERE, build, compile_program

from valve_agent import shared, wire
from valve_agent.devices.nvidia import routes, table

SOURCE = (build.NATIVE / "include" / "valve_protocol.h").read_text()
HEADER = re.sub(r"/\*.*?\*/", "", SOURCE, flags=re.S)
MIRRORS: dict[str, tuple[type[ctypes.Structure], ...]] = {
    "header": (wire.Header,),
    "bitmap": (wire.Bitmap,),
    "hello": (wire.Hello,),
    "welcome": (wire.Welcome,),
    "reject": (wire.Reject, wire.Denied),
    "arena_open": (wire.ArenaOpen,),
    "arena": (wire.Arena,),
    "arena_restore": (wire.ArenaRestore,),
    "want": (wire.Want,),
    "slabs": (wire.Grant, wire.Reclaim, wire.Reclaimed, wire.Return),
    "memory_open": (wire.MemoryOpen,),
    "memory": (wire.Memory,),
    "memory_mapped": (wire.MemoryMapped,),
    "memory_ready": (wire.MemoryReady,),
    "memory_map": (wire.MemoryMap,),
    "memory_quarantine": (wire.MemoryQuarantine,),
    "memory_done": (wire.MemoryDone,),
    "tenant": (wire.Tenant,),
    "tenant_ok": (wire.TenantOk,),
    "gpu_open": (wire.GpuTable,),
    "gpu_file": (wire.GpuFile, wire.GpuFileGone),
    "gpu_channel": (table.ChannelSlot,),
    "gpu_table": (table.TableLayout,),
    "page": (shared.PageLayout,),
    "ledger": (shared.LedgerLayout,),
}
ENUMS: dict[str, type[enum.IntEnum]] = {
    "valve_role": wire.Role,
    "valve_device": wire.Device,
    "valve_type": wire.Type,
    "valve_gpu_file_kind": wire.GpuFileKind,
    "valve_route": wire.Route,
    "valve_reject_code": wire.RejectCode,
    "valve_memory_route": wire.MemoryRoute,
}


def structs() -> dict[str, list[str]]:
    """Struct -> fields, as the header has them."""
    bodies = re.findall(r"^struct valve_(\w+) \{\n(.*?)^\};", HEADER, re.S | re.M)
    return {name: re.findall(r"(\w+)(?:\[\w+\])?;", body) for name, body in bodies}


def constants() -> list[str]:
    return re.findall(r"^#define (VALVE_\w+) \(?[0-9(V]", HEADER, re.M)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, ...]]:
    folder = tmp_path_factory.mktemp("layout")
    lines = [f"STRUCT({name});" for name in structs()]
    lines += [f"FIELD({name}, {field});" for name, fields in structs().items() for field in fields]
    lines += [f"CONSTANT({name});" for name in constants()]
    lines += [f"CONSTANT({name});" for body in re.findall(r"^enum valve_\w+ \{(.*?)\}", HEADER, re.S | re.M)
              for name in re.findall(r"(VALVE_\w+) = ", body)]  # fmt: skip
    lines += [f"CONSTANT(VALVE_LEDGER_BYTES({slabs}ull));" for slabs in (1, 96, 4096)]
    (folder / "layout.inc").write_text("\n".join(lines))
    program = compile_program(folder / "layout", HERE / "layout.c", f"-I{folder}")
    output = subprocess.run([program], capture_output=True, text=True, check=True, timeout=20).stdout
    words = [line.split() for line in output.splitlines()]
    return {name: tuple(map(int, numbers)) for name, *numbers in words}


def test_every_struct_of_the_header_has_a_mirror() -> None:
    assert set(structs()) == set(MIRRORS)


@pytest.mark.parametrize(
    ("name", "mirror"), [(name, mirror) for name, mirrors in MIRRORS.items() for mirror in mirrors]
)
def test_sizes_and_offsets(
    compiled: dict[str, tuple[int, ...]], name: str, mirror: type[ctypes.Structure]
) -> None:
    assert compiled[name] == (ctypes.sizeof(mirror),)
    ours = {
        str(field[0]): (getattr(mirror, field[0]).offset, getattr(mirror, field[0]).size)
        for field in mirror._fields_
    }
    theirs = {
        key.partition(".")[2]: (numbers[0], numbers[1])
        for key, numbers in compiled.items()
        if key.startswith(name + ".")
    }
    assert ours == theirs


def test_enums_and_constants(compiled: dict[str, tuple[int, ...]]) -> None:
    for name, mirror in ENUMS.items():
        body = re.search(rf"^enum {name} \{{(.*?)\}}", HEADER, re.S | re.M)
        assert body is not None
        for constant in re.findall(r"(VALVE_\w+) = ", body.group(1)):
            member = re.sub(r"^VALVE_(ROLE_|DEVICE_|ROUTE_|GPU_(?=CTL|UVM)|MEMORY_(?=BY_))?", "", constant)
            assert compiled[constant] == (mirror[member].value,), constant
        assert len(mirror) == len(re.findall(r"(VALVE_\w+) = ", body.group(1)))
    flags = {name.removeprefix("VALVE_HELLO_"): compiled[name][0] for name in constants() if "HELLO_" in name}
    assert flags == {flag.name: flag.value for flag in wire.HelloFlag}
    for name in ("MAGIC", "VERSION_MIN", "VERSION_MAX", "SLABS_MAX", "BITMAP_WORDS", "REQUESTS_MAX",
                 "TEXT_BYTES", "NAME_BYTES", "MEMORY_BATCH"):  # fmt: skip
        assert compiled[f"VALVE_{name}"] == (getattr(wire, name),)
    names = {"GPU_FILES_MAX": table.FILES_MAX, "GPU_CHANNELS_MAX": table.CHANNELS_MAX,
             "GPU_HOLD_CHANNELS": table.HOLD_CHANNELS, "GPU_HOLD_LAUNCHES": table.HOLD_LAUNCHES,
             "GPU_STOP_COMPUTE": routes.STOP_COMPUTE, "GPU_STOP_ALL": routes.STOP_ALL,
             "GPU_RUN": routes.RUN, "MAGIC": table.MAGIC}  # fmt: skip
    for name, value in names.items():
        assert compiled[f"VALVE_{name}"] == (value,)
    assert {wire.Route[name.replace("-", "_").upper()]: n for name, n in routes.NUMBERS.items()} == {
        route: route.value for route in wire.Route if route
    }
    assert compiled["gpu_table"] == (table.TABLE_BYTES,)
    for slabs in (1, 96, 4096):
        assert compiled[f"VALVE_LEDGER_BYTES({slabs}ull)"] == (shared.ledger_bytes(slabs),)


def test_every_type_has_a_frame() -> None:
    assert set(wire.FRAMES) == set(wire.Type)


@pytest.mark.parametrize("slabs", [set(), {0}, {63, 64, 65}, {4095}, set(range(4096))])
def test_bitmaps_come_back(slabs: set[int]) -> None:
    bitmap = wire.Bitmap.of(slabs)
    assert set(bitmap) == slabs
    assert len(bitmap) == len(slabs)
    assert list(bitmap) == sorted(slabs)
    assert int(bitmap) == sum(1 << slab for slab in slabs)
    for slab in slabs:
        assert bitmap.words[slab // 64] >> (slab % 64) & 1


@pytest.mark.parametrize("slab", [-1, 4096])
def test_a_slab_outside_is_refused(slab: int) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.4095"):
        wire.Bitmap.of({slab})


def changed(frame: wire.Frame, **header: int) -> bytes:
    for name, value in header.items():
        setattr(frame.header, name, value)
    return bytes(frame)


@pytest.mark.parametrize(
    ("what", "data", "error", "sentence"),
    [
        ("nothing", b"", wire.Truncated, "0 bytes is shorter than the 16-byte header"),
        ("half a header", b"VALV" * 3, wire.Truncated, "shorter than the 16-byte header"),
        ("not ours", b"GET / HTTP/1.1\r\n\r\n", wire.BadMagic, "this is no Valve peer"),
        ("unknown type", changed(wire.Want(), type=99), wire.UnknownType, "type 99 is unknown"),
        ("a frame cut off", bytes(wire.Want())[:-1], wire.Truncated, "WANT is 23 bytes long; it must be 24"),
        ("a frame with more", bytes(wire.Want()) + b"x", wire.Oversized, "WANT is 25 bytes long"),
        ("a size that lies", changed(wire.Want(), size=23), wire.Truncated, "WANT says it is 23 bytes"),
        ("a size that lies up", changed(wire.Want(), size=2**32 - 1), wire.Oversized, "says it is 42949"),
        ("a frame of a later version", changed(wire.Want(), version=7), wire.BadVersion, "version 7"),
        ("a HELLO of later versions", bytes(wire.Hello(version_min=3, version_max=9)), wire.BadVersion,
         "versions 3..9, this side 1..2: install the same version"),
        ("such a HELLO of another size", bytes(wire.Hello(version_min=3, version_max=9)) + bytes(64),
         wire.BadVersion, "install the same version"),
        ("a TENANT of an older version", bytes(wire.Tenant()), wire.BadVersion, "versions 0..0"),
        ("versions upside down", bytes(wire.Hello(version_min=2, version_max=1)), wire.BadVersion, "2..1"),
        ("a HELLO cut off in its versions", bytes(wire.Hello())[:18], wire.Truncated, "HELLO is 18 bytes"),
    ],
)  # fmt: skip
def test_bad_frames_are_named(what: str, data: bytes, error: type[wire.WireError], sentence: str) -> None:
    with pytest.raises(error, match=re.escape(sentence)) as caught:
        wire.parse(data)
    assert type(caught.value) is error, what
    assert caught.value.code == (
        wire.RejectCode.EVERSION if error is wire.BadVersion else wire.RejectCode.EPROTO
    )


def test_a_hello_that_overlaps_in_versions_is_taken() -> None:
    hello = wire.parse(changed(wire.Hello(version_min=1, version_max=5), version=5))
    assert isinstance(hello, wire.Hello)


def test_a_refusal_is_understood_whatever_its_version() -> None:
    frame = wire.parse(changed(wire.Reject(code=2, text="zu alt – update".encode()), version=9))
    assert isinstance(frame, wire.Reject)
    assert frame.sentence == "zu alt – update"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        yield left, right


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("cls", list(wire.FRAMES.values()))
def test_frames_and_descriptors_travel(
    pair: tuple[socket.socket, socket.socket], cls: type[wire.Frame]
) -> None:
    frame = cls(version_min=1, version_max=1) if cls.TYPE in (wire.Type.HELLO, wire.Type.TENANT) else cls()
    for count in cls.DESCRIPTORS:
        wire.send(pair[0], frame, [0] * count)
        got, fds = wire.recv(pair[1])
        assert bytes(got) == bytes(frame)
        assert len(fds) == count
        assert not any(os.get_inheritable(fd) for fd in fds)
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize(
    ("what", "data", "count", "error"),
    [
        ("too many for any frame", bytes(wire.Want()), 9, wire.WrongDescriptors),
        ("some where none belong", bytes(wire.Want()), 1, wire.WrongDescriptors),
        ("none where three belong", bytes(wire.ArenaRestore()), 0, wire.WrongDescriptors),
        ("with a bad frame", b"?" * 40, 3, wire.BadMagic),
        ("with a packet longer than any frame", bytes(wire.Want()) + bytes(5000), 2, wire.Oversized),
    ],
)
def test_no_descriptor_leaks_from_a_bad_packet(
    pair: tuple[socket.socket, socket.socket], what: str, data: bytes, count: int, error: type[wire.WireError]
) -> None:
    before = open_fds()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [0] * count))] if count else []
    pair[0].sendmsg([data], rights)
    with pytest.raises(error):
        wire.recv(pair[1])
    assert open_fds() == before, what


def test_the_end_of_a_connection_is_not_a_frame(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    with pytest.raises(wire.ConnectionClosed):
        wire.recv(pair[1])


def test_sending_to_a_closed_peer_is_an_error_not_a_signal(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].close()
    with pytest.raises(BrokenPipeError):
        wire.send(pair[0], wire.Want())


def test_a_wrong_number_of_descriptors_is_not_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(ValueError, match="ARENA carries"):
        wire.send(pair[0], wire.Arena(), [0])


def test_the_parser_takes_a_million_bad_frames() -> None:
    """Random, truncated, oversized and bit-flipped: a frame or a WireError, nothing else."""
    dice = random.Random(3)
    valid = [bytes(cls()) for cls in wire.FRAMES.values()]
    noise = dice.randbytes(1 << 16)
    frames = errors = 0
    for _ in range(1_000_000):
        number = dice.getrandbits(32)
        data = valid[number % len(valid)]
        kind = number >> 8 & 3
        at = (number >> 12) % len(data)
        if kind == 0:
            start = number >> 16 & 0x7FFF
            data = noise[start : start + (number >> 4 & 1023)]
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + noise[number >> 20 : (number >> 20) + 1] + data[at + 1 :]
        else:
            data = data + noise[: 1 + at]
        try:
            wire.parse(data)
            frames += 1
        except wire.WireError:
            errors += 1
    assert frames + errors == 1_000_000
    assert frames > 10_000, "flipped payload bytes still make frames"
    assert errors > 500_000


def test_a_page_is_one_fields_writer_each(tmp_path: Path) -> None:
    fd, page = shared.Page.create()
    peer = shared.PageLayout.from_buffer(shared._map(fd, shared.PAGE_BYTES, "page"))
    assert peer.magic == wire.MAGIC
    page.heartbeat_ns = 123
    page.gate = shared.Gate.PAUSED
    assert (peer.heartbeat_ns, peer.gate) == (123, 2)
    peer.busy, peer.busy_seq, peer.busy_since_ns, peer.decode_gap_ns = 1, 7, 8, 9
    assert (page.busy, page.busy_seq, page.busy_since_ns, page.decode_gap_ns) == (True, 7, 8, 9)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)  # a tenant cannot make the agent fault
    page.close()
    os.close(fd)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("a file", "no memory file that Valve made"),
        ("unsealed", "not sealed against shrinking"),
        ("small", "4096 bytes where"),
        ("sealed against writing", "cannot be mapped: Operation not permitted"),
    ],
)
def test_memory_that_is_not_as_ours_is_refused(tmp_path: Path, what: str, sentence: str) -> None:
    if what == "file":
        fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    elif what == "small":
        fd, page = shared.Page.create()
        page.close()
    elif what == "sealed against writing":
        fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, shared.ledger_bytes(64))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
    else:
        fd = os.memfd_create("x") if what == "unsealed" else os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    with pytest.raises(shared.SharedMemoryError, match=sentence):
        shared.Ledger(fd, 64)
    os.close(fd)


def test_a_ledger_that_changes_while_it_is_read_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fd, ledger = shared.Ledger.create(4)
    values = iter([0, 1, 1, 1])
    monkeypatch.setattr(shared.Ledger, "updates", property(lambda _: next(values)))
    assert ledger.read().updates == 1
    numbers = iter(range(1000))
    monkeypatch.setattr(shared.Ledger, "updates", property(lambda _: next(numbers)))
    with pytest.raises(shared.SharedMemoryError, match="changed 8 times"):
        ledger.read()
    ledger.close()
    os.close(fd)
