# SPDX-License-Identifier: Apache-2.0
"""Record when the hypervisor ran: tracefs' remotes/hypervisor, on a kernel whose EL2 can be traced.

A :class:`HypTrace` records every entry to EL2 and every exit from it, on all CPUs, within its context, and reads them
at the end. In between only EL2's own recording runs, some hundred instructions per event. A host has one such buffer,
so one process uses it at a time. All settings are restored.

The kernel prints events as text, with CLOCK_BOOTTIME truncated to microseconds (see :func:`now`). One interval is
accurate to 1 µs, the mean of a thousand to a few ten nanoseconds.

EL2 reads the virtual counter. So while a vCPU with a counter offset is loaded, its timestamps are wrong by years (seen
with Linux 7.3.4; trace_hyp_clock in arch/arm64/kvm/hyp/nvhe/clock.c). Protected VMs have no offset. Others have one
unless KVM_ARM_SET_COUNTER_OFFSET sets it to 0. Such a recording is refused as a whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from typing import NamedTuple, Self

from pyvmm.kvm.faulttrace import TRACEFS

REMOTE = "remotes/hypervisor"
ROOMY = 4096
"""Default KiB per CPU: some 150,000 events."""
_LEAST = 256
"""Minimum KiB: if an end mark is overwritten before recording stops, its reader waits forever."""
_EVENTS = ("hyp_enter", "hyp_exit", "selftest")
_MARK = 0x70797600
"""The mark in the last event of every CPU. Only the mark shows that no more events follow."""
_CHUNK = 1 << 16
_SLACK = 1_000_000_000
"""Tolerance in ns for events outside of the recording: the kernel compares clocks twice a second."""

# [001]	    6.476583: hyp_enter reason=guest_exit vcpu=97
_LINE = re.compile(
    rb"\[(\d+)\]\s+(\d+)\.(\d{6}): (?:hyp_(enter|exit) reason=(\w+) vcpu=(\d+)|selftest id=(\d+))"
    rb"|CPU:\d+ \[LOST (\d+) EVENTS\]"
)


class HypEvent(NamedTuple):
    """EL2 was entered, or left, on a CPU.

    ``ns`` is CLOCK_BOOTTIME, cut to the microsecond. ``reason`` is for an entry ``hvc``, ``smc``, ``sys``, ``psci`` or
    ``host_abort`` (from the host) or ``guest_exit``; for an exit ``eret_host`` or ``eret_guest``, or the firmware's
    ``smc`` or ``psci``. ``vcpu`` is the thread of the vCPU that is loaded on the CPU, 0 for none.
    """

    ns: int
    cpu: int
    entered: bool
    reason: str
    vcpu: int


def now() -> int:
    """Return the current time of the events' clock, in ns."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class HypTrace:
    """Records EL2's entries and exits. A context manager that never raises if it cannot record.

    ``kib`` is the buffer's size for each CPU. New events overwrite the oldest. Entering takes 0.1 s, because the kernel
    compares clocks. One that is in use cannot be entered again.
    """

    def __init__(self, kib: int = ROOMY) -> None:
        self.why_not = "it has not begun"
        """Why nothing is recorded; empty if :attr:`available`."""
        self.lost = 0
        """The number of overwritten events; known at the end."""
        self.whole_since = 0
        """The time from which no event is missing, in ns of :func:`now`; 0 without losses."""
        self._kib = max(kib, _LEAST)
        self._events: list[HypEvent] = []
        self._undo = contextlib.ExitStack()
        self._root = ""
        self._begun = 0

    @property
    def available(self) -> bool:
        """Whether events are, or were, recorded."""
        return not self.why_not

    def __enter__(self) -> Self:
        self._events, self.lost, self.whole_since = [], 0, 0
        with contextlib.ExitStack() as undo:
            try:
                self.why_not = self._begin(undo)
            except OSError as error:
                self.why_not = f"{error.filename or self._root or 'tracefs'}: {error.strerror}"
            if self.available:
                self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._undo:
            if self.available:
                try:
                    self._end()
                except OSError as error:
                    self.why_not = f"{error.filename or self._root}: {error.strerror}"

    def events(self) -> list[HypEvent]:
        """Return the recorded events, the oldest first, each CPU's in order; empty before the end."""
        return self._events

    # -- setting up and back

    def _begin(self, undo: contextlib.ExitStack) -> str:
        """Start recording, and register its end in ``undo``. Returns why it cannot, or an empty text."""
        self._root = ""
        mounted = next((path for path in TRACEFS if os.path.isdir(f"{path}/instances")), None)
        if mounted is None:
            if os.geteuid():
                return "only root can read the kernel's trace (tracefs)"
            return "tracefs is not mounted: mount -t tracefs nodev /sys/kernel/tracing"
        if not os.path.isdir(f"{mounted}/{REMOTE}"):
            return (
                f"this host's hypervisor cannot be traced: there is no {mounted}/{REMOTE}. It takes a kernel with "
                "CONFIG_NVHE_EL2_TRACING, as pyvmm lab kernel builds it, and KVM's mode protected or nvhe"
            )
        self._root = f"{mounted}/{REMOTE}"
        folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        undo.callback(os.close, folder)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "the hypervisor's trace buffer is in use: another pyvmm records with it"
        if self._get("tracing_on") != "0":
            return f"the hypervisor's trace buffer is in use: {self._root}/tracing_on is not 0, and not by this pyvmm"
        self._put("trace", "0")  # left from a killed reader: the size of a buffer in use cannot change
        size, _, state = self._get("buffer_size_kb").partition(" ")
        if state == "(loaded)":
            return "the hypervisor's trace buffer is in use: another process reads it"
        undo.callback(self._try_put, "buffer_size_kb", size)
        self._put("buffer_size_kb", str(self._kib))
        for event in _EVENTS:
            switch = f"events/hypervisor/{event}/enable"
            undo.callback(self._try_put, switch, self._get(switch))
            self._put(switch, "1")
        # Registered last, so it runs first: a buffer that is read to its end is freed, and its size reset.
        undo.callback(self._try_put, "trace", "0")
        undo.callback(self._try_put, "tracing_on", "0")
        self._begun = now()
        self._put("tracing_on", "1")
        return ""

    def _get(self, name: str) -> str:
        with open(f"{self._root}/{name}") as file:
            return file.read().strip()

    def _put(self, name: str, text: str) -> None:
        with open(f"{self._root}/{name}", "w") as file:
            file.write(text)

    def _try_put(self, name: str, text: str) -> None:
        with contextlib.suppress(OSError):
            self._put(name, text)

    # -- reading

    def _end(self) -> None:
        """Stop recording and read all of it."""
        marked = self._mark()
        self._put("tracing_on", "0")
        for cpu in marked:
            self._take(_read(f"{self._root}/per_cpu/cpu{cpu}/trace_pipe"))
        self._events.sort(key=lambda event: event.ns)
        first, last = self._begun - _SLACK, now() + _SLACK
        if self._events and not first <= self._events[0].ns <= self._events[-1].ns <= last:
            self._events = []
            self.why_not = (
                "the hypervisor's clock went astray while it was recorded, as it does with Linux 7.3 when a VM runs "
                "whose counter has an offset: KVM_ARM_SET_COUNTER_OFFSET of 0 prevents it"
            )

    def _mark(self) -> list[int]:
        """Let every online CPU write its end mark. Returns these CPUs."""
        before = os.sched_getaffinity(0)
        marked = []
        try:
            for cpu in sorted(int(name.removeprefix("cpu")) for name in os.listdir(f"{self._root}/per_cpu")):
                try:
                    os.sched_setaffinity(0, {cpu})
                except OSError:
                    continue  # offline, or in no cpuset: nothing of ours has run there
                self._put("write_event", str(_MARK))
                marked.append(cpu)
        finally:
            os.sched_setaffinity(0, before)
        return marked

    def _take(self, text: bytes) -> None:
        lost = False
        for cpu, seconds, us, which, reason, vcpu, _mark, gone in _LINE.findall(text):
            if gone:
                self.lost += int(gone)
                lost = True
                continue
            ns = int(seconds) * 1_000_000_000 + int(us) * 1000
            if lost:
                self.whole_since, lost = max(self.whole_since, ns), False
            if which:
                self._events.append(HypEvent(ns, int(cpu), which == b"enter", reason.decode(), int(vcpu)))


def _read(pipe: str) -> bytes:
    """Return a CPU's text up to its end mark. A further read would block forever."""
    mark = b"selftest id=%d\n" % _MARK
    text = bytearray()
    fd = os.open(pipe, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while data := os.read(fd, _CHUNK):
            searched = max(len(text) - len(mark), 0)
            text += data
            if (end := text.find(mark, searched)) >= 0:
                return bytes(text[:end])
    finally:
        os.close(fd)
    return bytes(text)
