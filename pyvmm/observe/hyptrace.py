# SPDX-License-Identifier: Apache-2.0
"""Asks the hypervisor when it ran: tracefs' remotes/hypervisor, on a kernel whose EL2 can be traced.

A :class:`HypTrace` records every entry to EL2 and every exit from it, on all CPUs, from the moment it is entered until
it is left, and reads them then: nothing of it runs in between but what EL2 itself does, some hundred instructions an
event. There is one such buffer in a host, so one process has it at a time; whatever was set is set back.

The kernel tells events in text, cut to the microsecond, of CLOCK_BOOTTIME (see :func:`now`): one interval is known to a
microsecond either way, the mean of a thousand to a few ten nanoseconds.

EL2 reads the virtual counter, so while a vCPU with a counter offset is loaded its stamps are off by years (seen with
Linux 7.3.4; trace_hyp_clock in arch/arm64/kvm/hyp/nvhe/clock.c). Protected VMs have none, others have one unless
KVM_ARM_SET_COUNTER_OFFSET makes it 0. Such a recording is refused as a whole, for what is between is not known.
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
"""KiB a CPU, unless told otherwise: some 150,000 events."""
_LEAST = 256
"""KiB: an end mark must not be overwritten before recording has stopped, or its reader would wait for ever."""
_EVENTS = ("hyp_enter", "hyp_exit", "selftest")
_MARK = 0x70797600
"""What the last event of every CPU says; that it has come is all there is to know that there are no more."""
_CHUNK = 1 << 16
_SLACK = 1_000_000_000
"""ns by which an event may seem to be outside the recording: the kernel compares clocks twice a second."""

# [001]	    6.476583: hyp_enter reason=guest_exit vcpu=97
_LINE = re.compile(
    rb"\[(\d+)\]\s+(\d+)\.(\d{6}): (?:hyp_(enter|exit) reason=(\w+) vcpu=(\d+)|selftest id=(\d+))"
    rb"|CPU:\d+ \[LOST (\d+) EVENTS\]"
)


class HypEvent(NamedTuple):
    """EL2 was entered, or left, on a CPU.

    ``ns`` is CLOCK_BOOTTIME, cut to the microsecond. ``reason`` is for an entry ``hvc``, ``smc``, ``sys``, ``psci`` or
    ``host_abort`` (from the host) or ``guest_exit``; for an exit ``eret_host`` or ``eret_guest``, or the firmware's
    ``smc`` or ``psci``. ``vcpu`` is the thread of the vCPU that is in the CPU's registers, 0 where none is.
    """

    ns: int
    cpu: int
    entered: bool
    reason: str
    vcpu: int


def now() -> int:
    """Return the time that events are stamped with, in ns."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class HypTrace:
    """Records EL2's entries and exits; a context manager that never raises for want of the means.

    ``kib`` is the buffer's size for each CPU; what it has no room for takes the place of the oldest. Entering takes a
    tenth of a second, for the kernel compares clocks. One that is in use cannot be entered again.
    """

    def __init__(self, kib: int = ROOMY) -> None:
        self.why_not = "it has not begun"
        """Why nothing is recorded; empty where :attr:`available`."""
        self.lost = 0
        """How many events were overwritten; known at the end."""
        self.whole_since = 0
        """From when on nothing is missing, in ns of :func:`now`; 0 where nothing was lost."""
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
        """Return what was recorded, the oldest first and each CPU's in its order; nothing before the end."""
        return self._events

    # -- setting up and back

    def _begin(self, undo: contextlib.ExitStack) -> str:
        """Set the hypervisor recording, and ``undo`` to stop it; returns why it cannot be, or nothing."""
        self._root = ""
        mounted = next((path for path in TRACEFS if os.path.isdir(f"{path}/instances")), None)
        if mounted is None:
            if os.geteuid():
                return "only root can read the kernel's trace (tracefs)"
            return "tracefs, through which the kernel tells, is not mounted: mount -t tracefs nodev /sys/kernel/tracing"
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
        self._put("trace", "0")  # what a reader that was killed has left: the size of a buffer in use stays as it is
        size, _, state = self._get("buffer_size_kb").partition(" ")
        if state == "(loaded)":
            return "the hypervisor's trace buffer is in use: somebody reads it"
        undo.callback(self._try_put, "buffer_size_kb", size)
        self._put("buffer_size_kb", str(self._kib))
        for event in _EVENTS:
            switch = f"events/hypervisor/{event}/enable"
            undo.callback(self._try_put, switch, self._get(switch))
            self._put(switch, "1")
        # Registered first, run before all of the above: a buffer that is read to its end goes away, and so its size.
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
        """Let every CPU that is online write its end mark; returns which."""
        before = os.sched_getaffinity(0)
        marked = []
        try:
            for cpu in sorted(int(name.removeprefix("cpu")) for name in os.listdir(f"{self._root}/per_cpu")):
                try:
                    os.sched_setaffinity(0, {cpu})
                except OSError:
                    continue  # offline, or in nobody's cpuset: nothing of ours has run there
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
    """Return a CPU's text up to its end mark: a read after that would never return."""
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
