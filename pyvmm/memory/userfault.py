# SPDX-License-Identifier: Apache-2.0
"""Receive and answer page faults on guest memory (userfaultfd).

A ``Userfault`` owns its descriptor; ``fault_server`` has a thread that reads one. KVM faults through ``Slot.hva``, so
register that address (:meth:`pyvmm.memory.memory.Memory.hva`). If ``Slot.view`` is the same mapping, the host's own
copies also block on a registered page. They do not hold the GIL meanwhile.

A vCPU that waits for an answer cannot be kicked (KVM faults pages in uninterruptibly on arm64): it continues when the
page is answered, woken or unregistered, or the ``Userfault`` is closed. So close that before the machine.

KVM pins a protected guest's pages without permission to wait, which userfaultfd needs: KVM_RUN fails with EFAULT. A
guest_memfd cannot be registered.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
from collections.abc import Callable
from ctypes import Structure, byref, sizeof
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Self

from pyvmm._native import ffi
from pyvmm.errors import HostError, UsageError, hex_
from pyvmm.kvm import libc
from pyvmm.memory.address import Hva, align_down
from pyvmm.memory.mman import MappingError
from pyvmm.pages import HOST_PAGE
from pyvmm.uapi import userfaultfd as uapi
from pyvmm.uapi.ioctl import Ioctl

DEVICE = "/dev/userfaultfd"
EVENTS: Final = (
    uapi.UFFD_FEATURE_EVENT_FORK
    | uapi.UFFD_FEATURE_EVENT_REMAP
    | uapi.UFFD_FEATURE_EVENT_REMOVE
    | uapi.UFFD_FEATURE_EVENT_UNMAP
)
"""Event messages other than faults. Their sender blocks until they are read, and this module does not read them."""
FEATURES: Final = (
    uapi.UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | uapi.UFFD_FEATURE_MISSING_SHMEM
    | uapi.UFFD_FEATURE_MINOR_SHMEM
    | uapi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | uapi.UFFD_FEATURE_THREAD_ID
    | uapi.UFFD_FEATURE_RWP
)
"""Features to request if the kernel has them."""

_BATCH = 64
_REQUESTS = tuple(each for each in vars(uapi).values() if isinstance(each, Ioctl))
_MODES = (
    ("missing", uapi.UFFDIO_REGISTER_MODE_MISSING, uapi.UFFD_FEATURE_MISSING_SHMEM),
    ("minor", uapi.UFFDIO_REGISTER_MODE_MINOR, uapi.UFFD_FEATURE_MINOR_SHMEM),
    ("wp", uapi.UFFDIO_REGISTER_MODE_WP, uapi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM),
    ("rwp", uapi.UFFDIO_REGISTER_MODE_RWP, uapi.UFFD_FEATURE_RWP),
)
_CAUSES = {
    ("UFFDIO_REGISTER", errno.EINVAL): (
        "part of it is not mapped memfd or anonymous memory",
        "use a memfd: a guest_memfd has no userfaultfd support, and its guest faults bypass the mapping",
    ),
    ("UFFDIO_REGISTER", errno.EBUSY): ("part of it is registered with another userfaultfd", None),
    ("UFFDIO_REGISTER", errno.ENOMEM): ("nothing is mapped there", None),
    ("UFFDIO_REGISTER", errno.EPERM): ("its file was not opened for writing", None),
    ("UFFDIO_COPY", errno.EEXIST): ("a page is there already", None),
    ("UFFDIO_ZEROPAGE", errno.EEXIST): ("a page is there already", None),
    ("UFFDIO_CONTINUE", errno.EEXIST): ("the page is mapped already", None),
    ("UFFDIO_CONTINUE", errno.EFAULT): ("the file has no page there yet", "write it through another mapping first"),
    ("*", errno.ENOENT): ("the range is not registered for this", "see Userfault.register"),
    ("*", errno.ESRCH): ("the process that made the userfaultfd is gone", None),
    ("*", errno.EBADF): ("it is closed", None),
}


class UserfaultError(MappingError):
    """A request on a userfaultfd failed. ``errno`` is the kernel's error, ``done`` the bytes done before it."""

    def __init__(self, call: str, values: str, code: int, done: int = 0) -> None:
        cause, hint = _CAUSES.get((call, code)) or _CAUSES.get(("*", code)) or (None, None)
        super().__init__(call, values, code, cause, hint)
        self.done = done


class FaultKind(Enum):
    """Why a page faulted."""

    MISSING = "missing"
    """The page is missing."""
    MINOR = "minor"
    """The file has the page, the mapping does not."""
    WP = "wp"
    """A store to a write-protected page."""
    RWP = "rwp"
    """Any access to a read-write-protected page."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that waits for an answer. ``tid`` is the waiting thread, None if the kernel does not report it."""

    address: Hva
    kind: FaultKind
    write: bool
    tid: int | None

    @property
    def page(self) -> Hva:
        """The start of its page."""
        return Hva(align_down(self.address))


class Userfault:
    """A userfaultfd, from :meth:`open`. A context manager. Any thread may use it. A request blocks only its caller.

    ``fd`` is its descriptor. ``available`` and ``features`` are masks of UFFD_FEATURE_*: what the kernel has, and what
    is enabled. Methods that put, map or protect pages let the threads waiting there continue, unless ``wake`` is false.
    """

    def __init__(self, fd: int, available: int, features: int) -> None:
        self.fd = fd
        self.available = available
        """UFFD_FEATURE_* that the kernel has."""
        self.features = features
        """The enabled ones of these features."""
        self._stop_server: Callable[[], None] | None = None

    @classmethod
    def open(cls, *, user_mode_only: bool = False, features: int = FEATURES) -> Self:
        """Open a userfaultfd, with those of ``features`` (UFFD_FEATURE_*) that the kernel has.

        ``user_mode_only`` needs no privilege. Faults inside the kernel, such as every guest's, then fail instead of
        waiting. Raises HostError with a hint if this process may not use userfaultfd, or the kernel lacks it.
        Raises UsageError for features that are events, and UserfaultError if the kernel refuses the features.
        """
        if features & EVENTS:
            raise UsageError(f"features {features & EVENTS:#x} are events, which this class does not read: drop them")
        # UFFDIO_API works once per descriptor. The first descriptor only reads the features.
        fd = _new(user_mode_only)
        try:
            available = _negotiate(fd, 0)
        finally:
            os.close(fd)
        fd = _new(user_mode_only)
        try:
            wanted = features & available
            _negotiate(fd, wanted)
            return cls(fd, available, wanted)
        except BaseException:
            os.close(fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<userfaultfd {self.fd}>"

    def close(self) -> None:
        """Stop serving and close. Waiting threads continue as if nothing had been registered. Idempotent."""
        if self._stop_server:
            self._stop_server()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    # -- ranges

    def register(
        self, hva: int, size: int, *, missing: bool = False, minor: bool = False, wp: bool = False, rwp: bool = False
    ) -> frozenset[Ioctl]:
        """Report faults in ``[hva, hva + size)`` from now on. Returns the requests that work there.

        ``missing``: no page there yet; ``minor``: the file has it, the mapping does not; ``wp``, ``rwp``: accesses to
        pages protected with :meth:`write_protect` and :meth:`rwprotect`. Registering again replaces the kinds.

        Raises UsageError for no kind, or for both ``wp`` and ``rwp``. Raises HostError for a kind that this kernel
        lacks, and UserfaultError for a range that cannot be registered.
        """
        mode = 0
        for (name, bit, feature), wanted in zip(_MODES, (missing, minor, wp, rwp), strict=True):
            mode |= bit if wanted else 0
            if wanted and not self.available & feature:
                raise HostError(
                    f"this kernel's userfaultfd does not report {name} faults of shared memory",
                    hint="minor faults need Linux 5.14, wp 5.19, rwp 7.3 (USERFAULTFD_RWP)",
                )
        if not mode:
            raise UsageError(f"registering {hex_(hva)}: choose at least one of missing, minor, wp and rwp")
        if wp and rwp:
            raise UsageError(
                f"registering {hex_(hva)} for both wp and rwp: they share one page table bit; choose one (EINVAL)"
            )
        argument = uapi.uffdio_register(mode=mode)
        _set_range(argument, hva, size)
        self._call(uapi.UFFDIO_REGISTER, argument, hva, size, mode)
        return frozenset(each for each in _REQUESTS if argument.ioctls >> (each.number & 0xFF) & 1)

    def unregister(self, hva: int, size: int) -> None:
        """Stop reporting faults there. Waiting threads continue. Raises UserfaultError for an invalid range."""
        self._call(uapi.UFFDIO_UNREGISTER, uapi.uffdio_range(start=hva, len=size), hva, size)

    def wake(self, hva: int, size: int) -> None:
        """Let threads that wait in a range try again. Raises UserfaultError for an invalid range."""
        self._call(uapi.UFFDIO_WAKE, uapi.uffdio_range(start=hva, len=size), hva, size)

    # -- faults

    def read(self) -> list[Fault]:
        """Return unread faults, only some if there are many. Does not wait. Raises UserfaultError once it is closed."""
        size = sizeof(uapi.uffd_msg)
        try:
            data = os.read(self.fd, _BATCH * size)
        except BlockingIOError:
            return []
        except OSError as error:
            raise UserfaultError("read", f"uffd={self.fd}", error.errno or errno.EIO) from error
        messages = (uapi.uffd_msg.from_buffer_copy(data, at) for at in range(0, len(data), size))
        return [self._fault(each) for each in messages if each.event == uapi.UffdEvent.UFFD_EVENT_PAGEFAULT]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until there is a fault to read. Returns False after ``timeout`` seconds."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def _fault(self, message: uapi.uffd_msg) -> Fault:
        told = message.arg.pagefault
        if told.flags & uapi.UFFD_PAGEFAULT_FLAG_RWP:
            kind = FaultKind.RWP
        elif told.flags & uapi.UFFD_PAGEFAULT_FLAG_WP:
            kind = FaultKind.WP
        else:
            kind = FaultKind.MINOR if told.flags & uapi.UFFD_PAGEFAULT_FLAG_MINOR else FaultKind.MISSING
        tid = told.feat.ptid if self.features & uapi.UFFD_FEATURE_THREAD_ID else None
        return Fault(Hva(told.address), kind, bool(told.flags & uapi.UFFD_PAGEFAULT_FLAG_WRITE), tid)

    # -- answers

    def copy(self, hva: int, data: bytes | bytearray | memoryview, *, wake: bool = True, wp: bool = False) -> None:
        """Put new pages with ``data`` at ``hva``, atomically for readers. ``wp`` write-protects them.

        Raises UserfaultError if the kernel refuses: its ``errno`` says why, its ``done`` how many bytes were done.
        ``wake``: let waiting threads continue.
        """
        source = ffi.from_buffer("uint8_t[]", data)
        mode = (0 if wake else uapi.UFFDIO_COPY_MODE_DONTWAKE) | (uapi.UFFDIO_COPY_MODE_WP if wp else 0)
        start = int(ffi.cast("uintptr_t", source))

        def rest(done: int) -> uapi.uffdio_copy:
            return uapi.uffdio_copy(dst=hva + done, src=start + done, len=len(data) - done, mode=mode)

        self._fill(uapi.UFFDIO_COPY, rest, "copy", hva, len(data), mode)

    def zeropage(self, hva: int, size: int = HOST_PAGE, *, wake: bool = True) -> None:
        """Put new pages of zeros at ``hva``. Otherwise as :meth:`copy`."""
        self._fill_range(uapi.UFFDIO_ZEROPAGE, uapi.uffdio_zeropage, "zeropage", hva, size, 0 if wake else 1)

    def continue_(self, hva: int, size: int = HOST_PAGE, *, wake: bool = True, wp: bool = False) -> None:
        """Map the file's pages at ``hva``. ``wp`` write-protects them. Otherwise as :meth:`copy`."""
        mode = (0 if wake else uapi.UFFDIO_CONTINUE_MODE_DONTWAKE) | (uapi.UFFDIO_CONTINUE_MODE_WP if wp else 0)
        self._fill_range(uapi.UFFDIO_CONTINUE, uapi.uffdio_continue, "mapped", hva, size, mode)

    def write_protect(self, hva: int, size: int = HOST_PAGE, on: bool = True, *, wake: bool = True) -> None:
        """Report stores to a range. With ``on`` false, stop reporting, and with ``wake`` let waiting threads continue.

        Raises UserfaultError if the kernel refuses.
        """
        argument = uapi.uffdio_writeprotect(
            mode=uapi.UFFDIO_WRITEPROTECT_MODE_WP if on else 0 if wake else uapi.UFFDIO_WRITEPROTECT_MODE_DONTWAKE
        )
        _set_range(argument, hva, size)
        self._call(uapi.UFFDIO_WRITEPROTECT, argument, hva, size, argument.mode)

    def rwprotect(self, hva: int, size: int = HOST_PAGE, on: bool = True, *, wake: bool = True) -> None:
        """Report all accesses to existing pages of a range. Otherwise as :meth:`write_protect`."""
        argument = uapi.uffdio_rwprotect(
            mode=uapi.UFFDIO_RWPROTECT_MODE_RWP if on else 0 if wake else uapi.UFFDIO_RWPROTECT_MODE_DONTWAKE
        )
        _set_range(argument, hva, size)
        self._call(uapi.UFFDIO_RWPROTECT, argument, hva, size, argument.mode)

    def attach(self, stop: Callable[[], None] | None) -> None:
        """Set the server's ``stop``, which is called before closing; None removes it.

        Raises UsageError if there is a server already.
        """
        if stop and self._stop_server:
            raise UsageError(f"{self!r} already has a server: stop that server first")
        self._stop_server = stop

    # -- inside

    def _call(self, request: Ioctl, argument: Structure, hva: int, size: int, mode: int | None = None) -> None:
        while code := libc.ioctl(self.fd, request.number, byref(argument))[1]:
            if code not in (errno.EAGAIN, errno.EINTR):
                raise UserfaultError(request.name, self._arguments(hva, size, mode), code)

    def _fill_range(self, request: Ioctl, kind: Any, field: str, hva: int, size: int, mode: int) -> None:
        def rest(done: int) -> Structure:
            argument: Structure = kind(mode=mode)
            _set_range(argument, hva + done, size - done)
            return argument

        self._fill(request, rest, field, hva, size, mode)

    def _fill(
        self, request: Ioctl, rest: Callable[[int], Structure], field: str, hva: int, size: int, mode: int
    ) -> None:
        """Repeat a request, which reports its bytes done in ``field``, until all bytes are done."""
        done = 0
        while True:
            argument = rest(done)
            _, code = libc.ioctl(self.fd, request.number, byref(argument))
            if not code:
                return
            done += max(0, getattr(argument, field))
            if code not in (errno.EAGAIN, errno.EINTR):
                raise UserfaultError(request.name, self._arguments(hva, size, mode), code, done)

    def _arguments(self, hva: int, size: int, mode: int | None) -> str:
        return f"uffd={self.fd}, {hex_(hva)}, size={size:#x}" + ("" if mode is None else f", mode={mode:#x}")


def _set_range(argument: Any, hva: int, size: int) -> None:
    argument.range.start, argument.range.len = hva, size


def _new(user_mode_only: bool) -> int:
    """Open a descriptor by the device, or by the system call if the device is not accessible."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (uapi.UFFD_USER_MODE_ONLY if user_mode_only else 0)
    with contextlib.suppress(OSError):
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            fd, code = libc.ioctl(device, uapi.USERFAULTFD_IOC_NEW.number, flags)
        finally:
            os.close(device)
        if not code:
            return fd
    number = uapi.NR_USERFAULTFD.get(os.uname().machine)
    fd, code = libc.syscall(number, flags) if number is not None else (-1, errno.ENOSYS)
    if not code:
        return fd
    if code == errno.ENOSYS:
        raise HostError("this kernel has no userfaultfd (CONFIG_USERFAULTFD)", hint="populate guest memory in advance")
    if code == errno.EPERM:
        raise HostError(
            f"userfaultfd({flags:#x}): EPERM: this process may not handle faults inside the kernel, such as a guest's",
            hint=f"run as root or with CAP_SYS_PTRACE, or make {DEVICE} accessible (chmod, chown), or as root: "
            "sysctl vm.unprivileged_userfaultfd=1",
        )
    raise HostError(f"userfaultfd({flags:#x}): {errno.errorcode.get(code, code)}: {os.strerror(code)}")


def _negotiate(fd: int, features: int) -> int:
    """Enable a new descriptor with ``features``. Returns those that the kernel has."""
    argument = uapi.uffdio_api(api=uapi.UFFD_API, features=features)
    _, code = libc.ioctl(fd, uapi.UFFDIO_API.number, byref(argument))
    if code:
        raise UserfaultError(uapi.UFFDIO_API.name, f"uffd={fd}, features={features:#x}", code)
    return int(argument.features)
