# SPDX-License-Identifier: Apache-2.0
"""Compute control on the `cpu` device: stop whole processes, and know when they have stopped.

Why it exists: `pause` must return only when no thread of any target executes user code, and soon.

How `pause` knows. SIGSTOP goes to each process. The thread that takes it flags every thread of the
process to stop before it next returns to user mode, and only then enters state T itself; so one thread
in T proves that all are flagged. A flagged thread can still execute on another CPU until something
interrupts it: one `membarrier(GLOBAL_EXPEDITED)` interrupts every CPU that runs a thread of a registered
process and returns after they were, so none can execute a user instruction any more. Seeing every single
thread stopped would need each of them to be scheduled in first, which takes longer the more there are.

* The fast path looks only at two threads: the thread-group leader, which the kernel prefers for the signal,
  and a witness, which gets a SIGSTOP of its own: a thread that was seen asleep, libvalve's if there is one.
  Where one of them waits for a CPU that an online thread has, the other wakes on an idle one. A leader that
  sleeps must be given a CPU too, against its own computing siblings, so until it resumes it has the
  shortest scheduling slice: then it gets its turn at once and not after theirs.
* A process of which neither has stopped within `ESCALATE_NS`, because every CPU is taken, or the leader is a
  zombie, or sits in an uninterruptible wait (vfork), is not waited for. Every thread gets a SIGSTOP
  of its own: one that executes is interrupted by the barrier, one that does not has the signal to take before
  its next user instruction. A thread with a signal pending cannot make another thread (the kernel restarts
  its clone after the signal), so the list of threads is whole when it shows none that has not been signalled.
* A process that is not registered for the barrier is confirmed thread by thread, by the state of each. A
  thread in state D that was signalled counts as off: it executes nothing, and its way back leads through
  the signal.

Threading model: the gate's only thread. Caller: gate.py, tests. Standard library only.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from valve_agent.devices.base import PauseTimeout, TargetRefused
from valve_agent.devices.cpu.kernel import membarrier_global_expedited, set_slice, tgkill

POLL_S = 20e-6
"""Between two looks. Looking without a pause would keep the CPU from them."""
SHORT_SLICE_NS = 100_000
SLOW_POLL_S = 200e-6
SETTLE_S = 2e-3
ESCALATE_NS = 300_000
"""How long leader and witness are waited for; flagging 50 threads takes about as long again."""
WITNESSES_MAX = 8
"""Threads looked at for one that sleeps."""
PAUSE_TIMEOUT_NS = 20_000_000
"""How long one `pause` may keep the gate's thread."""

_STOPPED = ord("T")
_SLEEPING = ord("S")
_OFF = frozenset(b"TtZXxD")  # states of a thread that executes nothing until a signal or a tracer lets it
_NO_WITNESS = frozenset(b"ZXxD")  # states of a leader that will not reach T soon, whatever its siblings do
_TOLD = frozenset(b"TtZXx")  # states of a thread that needs no signal of its own
_HEAD_BYTES = 64  # "pid (comm) state": at most 7 + 2 + 15 + 2 + 1 bytes; after it come digits only

_stop, _cont = signal.SIGSTOP, signal.SIGCONT
_send = signal.pidfd_send_signal
_preadv = os.preadv
_sleep = time.sleep
_clock = time.monotonic_ns


class ProcessTarget:
    """One offline process. Its descriptors are bound to the process, not to its number."""

    __slots__ = ("barrier", "gone", "pid", "pidfd", "proc_fd", "stat_fd", "witness", "witness_fd")

    def __init__(self, pid: int, pidfd: int, barrier: bool, proc_fd: int, stat_fd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.barrier = barrier
        self.proc_fd = proc_fd
        self.stat_fd = stat_fd
        self.gone = False
        self.witness = 0
        """A thread beside the leader that slept when it was last looked at; 0: none."""
        self.witness_fd = -1


class CpuCompute:
    """ComputeControl of the `cpu` device."""

    def __init__(self) -> None:
        self._buffer = bytearray(_HEAD_BYTES)
        self._into = [self._buffer]
        self.has_membarrier = membarrier_global_expedited()

    def open(self, pid: int, pidfd: int, barrier: bool) -> ProcessTarget:
        """See ComputeControl.open. `pid` must be the process of `pidfd`."""
        proc_fd = stat_fd = -1
        try:
            _send(pidfd, 0)
            proc_fd = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            # The thread's own file: /proc/PID/stat sums over all threads under the signal lock.
            stat_fd = os.open(f"task/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc_fd)
            # Alive now, so its number was not given to another process before we opened it.
            _send(pidfd, 0)
        except OSError as error:
            for fd in (proc_fd, stat_fd):
                if fd >= 0:
                    os.close(fd)
            raise TargetRefused(
                f"process {pid} cannot be paused: {error.strerror}. The agent must run as root or as "
                "the user of every offline process, with /proc mounted"
            ) from error
        return ProcessTarget(pid, pidfd, barrier and self.has_membarrier, proc_fd, stat_fd)

    def close(self, target: ProcessTarget) -> None:
        self._drop_witness(target)
        for fd in (target.pidfd, target.proc_fd, target.stat_fd):
            os.close(fd)

    def pause(self, targets: Sequence[ProcessTarget]) -> None:
        started = _clock()
        out_of_reach: list[ProcessTarget] = []
        for target in targets:
            if target.gone:
                continue  # its number may be another process's by now
            set_slice(target.pid, SHORT_SLICE_NS)
            try:
                _send(target.pidfd, _stop)
                if target.witness:
                    tgkill(target.pid, target.witness, _stop)
            except ProcessLookupError:
                target.gone = True
            except PermissionError:  # it was ours when it was opened
                out_of_reach.append(target)
        told = [target for target in targets if not target.gone and target not in out_of_reach]
        pending = [target for target in told if target.barrier]
        singly = [target for target in told if not target.barrier]
        fence = bool(pending)
        while pending:
            _sleep(POLL_S)
            late = _clock() - started > ESCALATE_NS
            waiting: list[ProcessTarget] = []
            for target in pending:
                code = self._leader_state(target)
                if code == _STOPPED or target.gone or self._witness_state(target) == _STOPPED:
                    continue
                if late or code in _NO_WITNESS:
                    self._flag_threads(target, started)
                else:
                    waiting.append(target)
            pending = waiting
        if singly:
            self._pause_singly(singly, started)
        if fence and not membarrier_global_expedited():
            # It worked when the targets were opened, so this is the kernel refusing what it granted.
            self.has_membarrier = False
            for target in targets:
                target.barrier = False
            self._pause_singly([target for target in told if not target.gone], started)
        if out_of_reach:
            pids = [target.pid for target in out_of_reach]
            why = "it runs as another user now (a setuid program?): the agent must run as root"
            raise PauseTimeout(pids, (_clock() - started) / 1e3, dict.fromkeys(pids, why))

    def resume(self, targets: Sequence[ProcessTarget]) -> None:
        for target in targets:
            if target.gone:
                continue  # its number may be another process's by now
            set_slice(target.pid, 0)
            try:
                _send(target.pidfd, _cont)
            except ProcessLookupError:
                target.gone = True
            except PermissionError:
                continue  # `pause` says so

    def quiesce(self, targets: Sequence[ProcessTarget]) -> None:
        """Nothing to do: a stopped process copies nothing."""

    def supply(self, target: ProcessTarget, number: int, fds: Sequence[int]) -> None:
        raise TargetRefused(
            "the cpu device needs no descriptors of a process; is the agent's --device right?"
        )

    def withdraw(self, target: ProcessTarget, number: int) -> None:
        """It has none."""

    def tend(self, targets: Sequence[ProcessTarget]) -> Sequence[tuple[ProcessTarget, str]]:
        """Finds each process a witness that sleeps; none can fail."""
        for target in targets:
            if self._witness_state(target) != _SLEEPING:
                self._choose_witness(target)
        return ()

    def notes(self) -> Sequence[tuple[str, dict[str, object]]]:
        return ()

    def running(self, targets: Sequence[ProcessTarget]) -> Sequence[ProcessTarget]:
        """Paused targets that somebody continued. Looks twice: the first thread that takes a stop has none
        pending and is in no stop yet while it flags all the others."""
        suspects = [target for target in targets if self._seems_to_run(target)]
        if suspects:
            _sleep(SETTLE_S)
        return [target for target in suspects if self._seems_to_run(target)]

    def _seems_to_run(self, target: ProcessTarget) -> bool:
        """Where the leader tells nothing (zombie, D, or still waiting for a CPU to stop) the threads do."""
        if self._leader_state(target) == _STOPPED or target.gone:
            return False
        states = self._thread_states(target)
        if _STOPPED in states.values():
            return False  # the stop of the whole process is in force; SIGCONT would have ended it for all
        return any(code not in _OFF and not self._is_flagged(target, tid) for tid, code in states.items())

    def _leader_state(self, target: ProcessTarget) -> int:
        """Its leader's state letter; 0 once the process is gone."""
        try:
            return self._state_in(target.stat_fd)
        except ProcessLookupError:
            # The leader may have been reaped by an exec of another thread; the pidfd knows better.
            target.gone = self.is_gone(target)
            return 0

    def _witness_state(self, target: ProcessTarget) -> int:
        """The witness's state letter; 0 without one."""
        if not target.witness:
            return 0
        try:
            return self._state_in(target.witness_fd)
        except ProcessLookupError:
            self._drop_witness(target)
            return 0

    def _choose_witness(self, target: ProcessTarget) -> None:
        """The first sleeping thread but the leader, of the oldest few: libvalve's is among them."""
        self._drop_witness(target)
        for tid in self._threads(target)[1 : 1 + WITNESSES_MAX]:
            try:
                target.witness_fd = os.open(
                    f"task/{tid}/stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=target.proc_fd
                )
            except (ProcessLookupError, FileNotFoundError):
                continue
            target.witness = int(tid)
            if self._witness_state(target) == _SLEEPING:
                return
            self._drop_witness(target)

    def _drop_witness(self, target: ProcessTarget) -> None:
        target.witness = 0
        if target.witness_fd >= 0:
            os.close(target.witness_fd)
            target.witness_fd = -1

    def _is_flagged(self, target: ProcessTarget, tid: int) -> bool:
        """A SIGSTOP of its own waits for this thread, to be taken before its next user instruction."""
        try:
            with open(f"/proc/{target.pid}/task/{tid}/status", "rb") as status:
                lines = status.read().splitlines()
        except (ProcessLookupError, FileNotFoundError):
            return True
        pending = next(line for line in lines if line.startswith(b"SigPnd:"))
        return bool(int(pending.split()[1], 16) >> (_stop - 1) & 1)

    def is_gone(self, target: ProcessTarget) -> bool:
        """The whole process has ended (a zombie leader with live threads has not)."""
        try:
            _send(target.pidfd, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # there it is, out of our reach
            return False
        return False

    def _threads(self, target: ProcessTarget) -> list[str]:
        """The ids of its threads; none once it is gone."""
        try:
            task_fd = os.open("task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=target.proc_fd)
        except (ProcessLookupError, FileNotFoundError):
            target.gone = self.is_gone(target)
            return []
        try:
            return os.listdir(task_fd)
        finally:
            os.close(task_fd)

    def _thread_states(self, target: ProcessTarget) -> dict[int, int]:
        """tid -> state letter of every thread that lives."""
        states = {int(tid): self._state_of(target, tid) for tid in self._threads(target)}
        return {tid: code for tid, code in states.items() if code}

    def _state_of(self, target: ProcessTarget, tid: str) -> int:
        """The state letter of one thread; 0 if it has ended."""
        try:
            fd = os.open(f"task/{tid}/stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=target.proc_fd)
        except (ProcessLookupError, FileNotFoundError):
            return 0
        try:
            return self._state_in(fd)
        except ProcessLookupError:
            return 0
        finally:
            os.close(fd)

    def _state_in(self, stat_fd: int) -> int:
        """The letter after the name in /proc/PID/task/TID/stat. Raises ProcessLookupError."""
        size = _preadv(stat_fd, self._into, 0)
        return self._buffer[self._buffer.rfind(b")", 0, size) + 2]

    def _all_off(self, target: ProcessTarget, states: dict[int, int]) -> bool:
        """No thread executes user code."""
        if target.gone:
            return True
        if not states or any(code not in _OFF for code in states.values()):
            return False
        # A thread born between listing and reading is flagged if anything is in T, but perhaps not
        # stopped: the set must be the same after the reading as before it.
        again = self._thread_states(target)
        return again.keys() == states.keys() and all(code in _OFF for code in again.values())

    def _flag_threads(self, target: ProcessTarget, started: int) -> None:
        """Give every thread a SIGSTOP of its own. Raises PauseTimeout if new ones keep coming."""
        flagged: set[str] = set()
        while True:
            fresh = set(self._threads(target)) - flagged
            if not fresh:
                return
            for tid in fresh:
                tgkill(target.pid, int(tid), _stop)
            flagged |= fresh
            if _clock() - started > PAUSE_TIMEOUT_NS:
                why = {target.pid: f"it keeps making threads ({len(flagged)} signalled)"}
                raise PauseTimeout([target.pid], (_clock() - started) / 1e3, why)

    def _pause_singly(self, targets: Sequence[ProcessTarget], started: int) -> None:
        """Confirm by reading every thread: for what no barrier interrupts. Raises PauseTimeout."""
        signalled: set[tuple[int, int]] = set()
        pending = list(targets)
        while True:
            elapsed = _clock() - started
            waiting: list[ProcessTarget] = []
            for target in pending:
                states = self._thread_states(target)
                witness = states.get(target.pid) not in _NO_WITNESS and elapsed <= ESCALATE_NS
                fresh = {(target.pid, tid) for tid, code in states.items() if code not in _TOLD} - signalled
                if not witness and fresh:
                    for pid, tid in fresh:
                        tgkill(pid, tid, _stop)
                    signalled |= fresh
                    waiting.append(target)
                elif not self._all_off(target, states):
                    waiting.append(target)
            pending = waiting
            if not pending:
                return
            if elapsed > PAUSE_TIMEOUT_NS:
                why = {target.pid: self._describe(target) for target in pending}
                raise PauseTimeout([target.pid for target in pending], elapsed / 1e3, why)
            _sleep(SLOW_POLL_S)

    def _describe(self, target: ProcessTarget) -> str:
        counts: dict[str, int] = {}
        for code in self._thread_states(target).values():
            counts[chr(code)] = counts.get(chr(code), 0) + 1
        return "threads by state: " + ", ".join(f"{state} {n}" for state, n in sorted(counts.items()))
