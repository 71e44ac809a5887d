# SPDX-License-Identifier: Apache-2.0
"""Layouts, sizes and status codes of each driver branch, asked of a running fake by raw ioctl.

The figures are sizeof() over the public headers of the version named in each row.
"""

from __future__ import annotations

import struct

import pytest

from fakenv import BRANCHES, Machine, NewMachine

#           version       channel vaspace memory schedule probed name uvm_gpus
LAYOUTS = {
    "535": ("535.288.01", 360, 48, 120, 2, 256, 132, 32),
    "550": ("550.163.01", 360, 48, 128, 2, 256, 132, 256),
    "560": ("560.35.03", 360, 48, 128, 2, 256, 132, 256),
    "565": ("565.77", 360, 48, 128, 2, 256, 132, 256),
    "570": ("570.211.01", 368, 48, 128, 2, 256, 132, 256),
    "575": ("575.64.05", 368, 48, 128, 3, 256, 132, 256),
    "580": ("580.142", 368, 56, 128, 3, 384, 132, 256),
    "590": ("590.48.01", 368, 56, 128, 3, 384, 132, 256),
    "595": ("595.45.04", 368, 56, 128, 3, 384, 68, 256),
}


def test_every_branch_has_a_row() -> None:
    assert tuple(LAYOUTS) == BRANCHES


@pytest.mark.parametrize("branch", BRANCHES)
def test_sizes_are_exact_per_branch(new_machine: NewMachine, branch: str) -> None:
    version, channel, vaspace, memory, schedule, probed, name, uvm_gpus = LAYOUTS[branch]
    machine = new_machine(branch=branch)
    actor = machine.actor()
    actor.run(f"""
        import struct, rm
        c = rm.Client()
        t = c.tree(channels=2, channel_size={channel})
        memory_params = bytearray({memory}); struct.pack_into("Q", memory_params, 64, 4 << 20)
    """)

    def status(expression: str) -> int:
        value: int = actor.run(f"result = ({expression})[0]")
        return value

    allocations = [
        ("channel", "t['tsg'], rm.CHANNEL, bytes({size})", channel, 728 - channel),
        ("vaspace", "t['device'], rm.VASPACE, bytes({size})", vaspace, 104 - vaspace),
        (
            "memory",
            "t['device'], rm.MEMORY, bytes(memory_params[:{size}].ljust({size}, b'\\0'))",
            memory,
            248 - memory,
        ),
    ]
    for what, call, right, of_another_branch in allocations:
        for wide in (False, True):
            form = f"c.alloc({{}}, wide={wide}, xfer={wide})"
            assert status(form.format(call.format(size=right))) == 0, what
            assert status(form.format(call.format(size=of_another_branch))) == 0x3A, what
    controls = [
        ("TSG schedule", "t['tsg']", 0xA06C0101, schedule),
        ("probed ids", "c.handle", 0x214, probed),
        ("name string", "t['subdevice']", 0x20800110, name),
        ("preempt", "t['tsg']", 0xA06C0105, 8),
        ("get info", "t['tsg']", 0xA06C0106, 4),
        ("timeslice", "t['tsg']", 0xA06C0104, 8),
        ("restart runlist", "t['channels'][0]", 0xA06F0111, 2),
        ("work submit token", "t['channels'][0]", 0xC36F0108, 4),
    ]
    for what, handle, command, right in controls:
        assert status(f"c.control({handle}, {command}, bytes({right}))") == 0, what
        for wrong in (right - 1, right + 1):
            assert status(f"c.control({handle}, {command}, bytes({wrong}))") == 0x1F, what
    assert status("(c.disable(t['subdevice'], t['channels']),)") == 0
    assert status("c.control(t['subdevice'], rm.DISABLE_CHANNELS, bytes(535))") == 0x1F

    seen = actor.run("""
        data = rm.escape(c.fd, 210, struct.pack("II64s", ord("2"), 0, b""))
        proc = open("/proc/driver/nvidia/version").read()
        result = [data[8:].split(b"\\0")[0].decode(), proc]
    """)
    assert seen[0] == version
    assert f"  {version}  " in seen[1]

    actor.run("u = rm.uvm_open(); base = 1 << 40; import os")
    assert status("(rm.uvm(u, 73, struct.pack('QQIxxxx', base, 4 << 20, 9), 16),)") == 0
    assert status("c.alloc(t['device'], rm.MEMORY, bytes(memory_params), handle=0x77)") == 0
    assert status(f"(rm.uvm_map(u, base, 4 << 20, c.handle, 0x77, {uvm_gpus}),)") == 0


def test_a_gpu_is_found_by_its_uuid(new_machine: NewMachine) -> None:
    actor = new_machine(gpus=2).actor()
    found = actor.run("""
        import ctypes, struct, rm
        import driver_api
        cu, c = driver_api.Cuda(context=False), rm.Client()
        def ask(uuid, flags=2, size=272):
            params = struct.pack("256s4I", uuid, flags, 0, 9, 9)[:size]
            status, data = c.control(c.handle, 0x274, params)
            return [status, *struct.unpack_from("2I", data, 264)] if size == 272 and not status else status
        uuids = []
        for gpu in (0, 1):
            uuid = (ctypes.c_uint8 * 16)()
            cu("cuDeviceGetUuid_v2", uuid, gpu)
            uuids.append(bytes(uuid))
        result = [*map(ask, uuids), ask(b"nobody"), ask(uuids[0], 0), ask(uuids[0], 2, 271)]
    """)
    assert found == [[0, 0, 0], [0, 1, 0], 0x57, 0x57, 0x1F]


# what, expression, status
STATUSES = [
    ("a control of an unknown number is not supported", "c.control(t['tsg'], 0xA06C0999, bytes(4))", 0x56),
    ("a channel's control is not supported on a group", "c.control(t['tsg'], 0xA06F0111, bytes(2))", 0x56),
    ("a control on no object", "c.control(0x1234, 0xA06C0105, bytes(8))", 0x57),
    (
        "a client that does not exist",
        "rm.Client(fd=c.fd, handle=0xC1D0FFFF).control(1, 0xA06C0105, bytes(8))",
        0x23,
    ),
    ("the kernel-only switch for all user channels", "c.control(t['subdevice'], 0x20801117, bytes(1))", 0x1B),
    ("an internal control", "c.control(t['tsg'], 0xA06C0202, bytes(8))", 0x56),
    ("a control that no driver exports", "c.control(t['subdevice'], 0x2080110A, bytes(4))", 0x56),
    ("a class that does not exist", "c.alloc(t['device'], 0x1234, b'')", 0x22),
    ("a channel below a subdevice", "c.alloc(t['subdevice'], rm.CHANNEL, bytes(368))", 0x36),
    ("a handle that is taken", "c.alloc(t['device'], rm.SUBDEVICE, bytes(4), handle=t['tsg'])", 0x19),
    ("a GPU that is not there", "c.alloc(c.handle, rm.DEVICE, struct.pack('I', 5) + bytes(52))", 0x26),
    ("65 channels in one call", "(c.disable(t['subdevice'], t['channels'], count=65),)", 0x1F),
    ("an event pointer from user space", "(c.disable(t['subdevice'], t['channels'], event=1),)", 0x1B),
    ("a channel that does not exist in the list", "(c.disable(t['subdevice'], [0x4321]),)", 0x57),
    ("a preemption timeout above one second", "(c.preempt(t['tsg'], timeout_us=1000001),)", 0x1F),
    ("parameters of size zero", "c.control(t['tsg'], 0xA06C0105, b'')", 0x1F),
    ("scheduling one channel of a group", "c.control(t['channels'][0], 0xA06F0103, bytes(3))", 0x40),
    ("freeing nothing", "(c.free(0x4321),)", 0x57),
    ("a timeslice of zero is taken as the least", "c.control(t['tsg'], rm.SET_TIMESLICE, bytes(8))", 0),
]


@pytest.fixture
def actor_with_tree(machine: Machine):  # type: ignore[no-untyped-def]
    actor = machine.actor()
    actor.run("import struct, os, errno, rm; c = rm.Client(); t = c.tree()")
    return actor


@pytest.mark.parametrize(
    ("expression", "status"), [row[1:] for row in STATUSES], ids=[row[0] for row in STATUSES]
)
def test_refusals(actor_with_tree, expression: str, status: int) -> None:  # type: ignore[no-untyped-def]
    assert actor_with_tree.run(f"result = ({expression})[0]") == status


def test_ioctl_errors_are_errno_not_status(actor_with_tree) -> None:  # type: ignore[no-untyped-def]
    got = actor_with_tree.run("""
        def code(f):
            try: f()
            except OSError as e: return e.errno
        gpu = os.open("/dev/nvidia0", os.O_RDWR)
        result = [
            code(lambda: rm.escape(c.fd, rm.CONTROL, bytes(31))),
            code(lambda: rm.escape(gpu, rm.CONTROL, bytes(32))),
            code(lambda: rm.escape(c.fd, 0x7f, bytes(16))),
            code(lambda: rm.escape(c.fd, 210, struct.pack("II64s", 0, 0, b"1.2.3"))),
        ]
    """)
    assert got == [22, 22, 22, 22]


def test_a_device_file_is_tied_to_one_control_file(actor_with_tree) -> None:  # type: ignore[no-untyped-def]
    got = actor_with_tree.run("""
        gpu = os.open("/dev/nvidia0", os.O_RDWR)
        rm.escape(gpu, 201, struct.pack("i", c.fd))
        try: rm.escape(gpu, 201, struct.pack("i", c.fd)); result = 0
        except OSError as e: result = e.errno
    """)
    assert got == 22


def test_uvm_wants_initialize_first(actor_with_tree) -> None:  # type: ignore[no-untyped-def]
    got = actor_with_tree.run("""
        u = os.open("/dev/nvidia-uvm", os.O_RDWR)
        ask = lambda: rm.uvm(u, 73, struct.pack("QQIxxxx", 1 << 40, 1 << 21, 9), 16)
        result = [ask(), rm.uvm(u, 0x30000001, bytes(16), 8), ask(), ask()]
    """)
    assert got == [0x16, 0, 0, 0x68]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, [0, 0, 2, 0, 2], id="one GPU"),
        pytest.param({"gpus": 2}, [0, 0, 0, 0, 2], id="two GPUs"),
        pytest.param({"no_driver": True}, [2, 2, 2, 2, 2], id="no driver"),
    ],
)
def test_which_files_are_there(new_machine: NewMachine, options: dict[str, int], expected: list[int]) -> None:
    actor = new_machine(**options).actor()
    assert (
        actor.run("""
        import rm
        result = [rm.try_open("/dev/nvidia" + n) for n in ("ctl", "0", "1", "-uvm", "-modeset")]
    """)
        == expected
    )


def test_a_version_that_nobody_knows(new_machine: NewMachine) -> None:
    actor = new_machine(branch="595", driver_version="611.20.01").actor()
    assert "  611.20.01  " in actor.run("result = open('/proc/driver/nvidia/version').read()")


def test_struct_widths_of_the_test_client() -> None:
    import rm

    assert rm.iowr(rm.CONTROL, 32) == 0xC020462A
    assert rm.iowr(rm.ALLOC, 48) == 0xC030462B
    assert struct.calcsize("B3xIBB6xQ") + 2 * struct.calcsize("64I") == 536
