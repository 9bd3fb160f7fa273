# SPDX-License-Identifier: Apache-2.0
"""pyvmm's exceptions. Every message says what failed, with which values, why, and what to do.

The library raises; only the CLI prints and exits (with ``exit_status``).
"""

from __future__ import annotations

import contextlib
import errno as _errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_FORKING = ("/subprocess.py", "/experiment/child.py", "/host/processes.py")


class PyvmmError(Exception):
    """The base of all pyvmm errors. ``hint`` is the next step, if one is known."""

    exit_status = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


class UsageError(PyvmmError):
    """The request is invalid (a missing kernel file, overlapping slots, an unknown payload)."""

    exit_status = 2


class OptionError(UsageError):
    """Options are invalid, alone or together. ``options`` names the options at fault.

    Each is a long name without dashes, ``cpus``. For a repeated option it may name the element, ``disk[1]``, and for
    one with parts the part, ``net.host`` or ``disk[1].queues``.
    """

    def __init__(self, message: str, *options: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.options = options


class HostError(PyvmmError):
    """This host cannot do it (no /dev/kvm, no pKVM, the wrong architecture)."""

    exit_status = 5


class LimitError(HostError):
    """A limit on this process, or on its host, is too small for what was asked."""


class KvmError(PyvmmError):
    """A system call on one of KVM's file descriptors failed.

    ``call`` is its kernel name, ``values`` its arguments as text, ``errno`` the kernel's error. ``cause`` says it in
    the words of this call; None: in those of libc.
    """

    def __init__(self, call: str, values: str, errno: int, cause: str | None = None, hint: str | None = None) -> None:
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(f"{call}({values}): {name}: {cause or os.strerror(errno)}", hint=hint)
        self.call = call
        self.values = values
        self.errno = errno


class GuestMemoryError(PyvmmError):
    """Guest memory is not accessible: ``done`` bytes are done.

    ``gpa`` is the address of the first byte not done, ``state`` its page's state in the ledger.
    """

    def __init__(self, what: str, gpa: int, done: int, state: str, *, hint: str | None = None) -> None:
        super().__init__(f"{what}: stopped at gpa {hex_(gpa)} after {done} bytes: the page is {state}", hint=hint)
        self.gpa = gpa
        self.done = done
        self.state = state


def exhausted(error: BaseException, need: int = 0) -> LimitError | None:
    """Return the message for an error caused by a limit on this process, or None for other errors.

    It also checks the errors that ``error`` was raised from. A HostError already has its message. ``need`` is the
    number of descriptors needed, if known. The function is in this module because nothing can be imported at the limit.
    """
    seen: BaseException | None = None if isinstance(error, HostError) else error
    while seen is not None:
        number = getattr(seen, "errno", None)
        if number == _errno.EMFILE or (isinstance(seen, ImportError) and _no_descriptor_left(seen)):
            return _no_files(need)
        if number == _errno.ENFILE:
            return LimitError("this host has no file descriptor left (ENFILE)", hint="raise the sysctl fs.file-max")
        if isinstance(seen, RuntimeError) and "new thread" in str(seen):
            return _no_process("thread")
        if number == _errno.EAGAIN and _forked(seen):
            return _no_process("process")
        seen = seen.__cause__ or seen.__context__
    return None


def _no_files(need: int) -> LimitError:
    soft = os.sysconf("SC_OPEN_MAX")
    more = f"about {need}" if need > soft else f"more than {soft}"
    return LimitError(
        f"RLIMIT_NOFILE is too small: {more} file descriptors are needed, but this process may have only {soft}"
        f"{_hard('RLIMIT_NOFILE', soft)}",
        hint=f"ulimit -n {max(need + need // 4, 1024, 2 * soft)}; for a service: LimitNOFILE=",
    )


def _no_process(what: str) -> LimitError:
    return LimitError(
        f"this host gives no {what} more: RLIMIT_NPROC, or pids.max of the cgroup, is too small"
        f"{_hard('RLIMIT_NPROC', -1)}",
        hint="each vCPU and each device needs a thread: ulimit -u 4096; for a service: TasksMax=; or end some of this "
        "user's processes",
    )


def _hard(name: str, soft: int) -> str:
    try:
        import resource

        limit, hard = resource.getrlimit(getattr(resource, name))
    except (ImportError, OSError):
        return ""
    words = ["unlimited" if value == resource.RLIM_INFINITY else str(value) for value in (limit, hard)]
    return f" (hard limit {words[1]})" if soft >= 0 else f" ({name} is {words[0]}, its hard limit {words[1]})"


def _no_descriptor_left(error: ImportError) -> bool:
    # dlopen reports it only as text. If another thread failed to read a module, this one gets no reason.
    if os.strerror(_errno.EMFILE) in str(error):
        return True
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as why:
        return why.errno == _errno.EMFILE
    return False


def _forked(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # Only after a fork: elsewhere this errno means that there is nothing to read.
    return trace is not None and trace.tb_frame.f_code.co_filename.endswith(_FORKING)


def without_directory(error: BaseException) -> UsageError | None:
    """Return the message for an ``error`` caused by a removed working directory, or None for other errors."""
    if not isinstance(error, FileNotFoundError) or error.filename is not None:
        return None
    try:
        os.getcwd()
    except FileNotFoundError:
        where = os.readlink("/proc/self/cwd").removesuffix(" (deleted)")
        return UsageError(
            f"the working directory {where} has been removed", hint="cd to an existing directory, and try again"
        )
    return None


@contextlib.contextmanager
def within_limits(need: int = 0) -> Iterator[None]:
    """Convert errors within it that a limit caused to HostError. ``need`` is that of :func:`exhausted`."""
    try:
        yield
    except Exception as error:
        if limit := exhausted(error, need):
            raise limit from error
        raise


def did_you_mean(word: str, names: Iterable[str], kind: str = "") -> str | None:
    """Return a hint with the one of ``names`` nearest to ``word``, after ``kind``; None if none is near."""
    from difflib import get_close_matches

    near = get_close_matches(word, list(names), n=1)
    return f"did you mean {kind}{near[0]}?" if near else None


def pip_install(*packages: str) -> str:
    """Return the line that installs packages for the very Python that runs this, as a hint."""
    import shlex
    import sys

    return shlex.join([sys.executable or "python3", "-m", "pip", "install", *packages])


def hex_(value: int) -> str:
    """Write an address as the documentation does: ``0x8000_0000``."""
    digits = f"{value:x}"
    head = len(digits) % 4
    groups = ([digits[:head]] if head else []) + [digits[i : i + 4] for i in range(head, len(digits), 4)]
    return "0x" + "_".join(groups)
