# SPDX-License-Identifier: Apache-2.0
"""One file descriptor of KVM: calls, errors with names, ordered closing. Base of the other modules."""

from __future__ import annotations

import errno as _errno
import os
from ctypes import Structure, _SimpleCData, addressof, byref, sizeof

from pyvmm.errors import KvmError
from pyvmm.kvm import libc
from pyvmm.uapi.kvm import KVM_GET_DEVICE_ATTR, KVM_SET_DEVICE_ATTR, kvm_device_attr

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Any, Self, TypeAlias

    from pyvmm.kvm.causes import Value
    from pyvmm.uapi.ioctl import Ioctl

CData: TypeAlias = "Structure | _SimpleCData[Any]"


class Kernel:
    """Makes the calls of every :class:`Fd`. A subclass can record or replace them (pyvmm.kvm.stand_in)."""

    pretends = False
    """Whether its VMs cannot run, so that nothing outside may be changed for them."""

    def open(self, path: str) -> int:
        """Open KVM's device. Raises OSError."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: Fd, request: Ioctl, argument: int | CData, values: Mapping[str, Value]) -> tuple[int, int]:
        """Return the result (or -1) and errno (or 0). ``values`` describe ``argument``'s contents."""
        del values
        return libc.ioctl(fd.fileno(), request.number, argument if isinstance(argument, int) else byref(argument))


KERNEL = Kernel()


class Fd:
    """Owns a file descriptor and everything made from it; closing is idempotent, children first, newest first.

    ``label`` names it in errors (``vm=7``). After close every call fails with EBADF. ``kernel`` answers the calls of an
    Fd without an owner, and of all its children.
    """

    kind = "fd"

    def __init__(self, fd: int, owner: Fd | None = None, kernel: Kernel = KERNEL) -> None:
        self.kernel: Kernel = kernel if owner is None else owner.kernel
        self._fd = fd
        self._owner = owner
        self._children: list[Fd] = []
        self.label = f"{self.kind}={fd}"
        if owner is not None:
            owner._children.append(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.label}{' closed' if self.closed else ''}>"

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._fd < 0

    def fileno(self) -> int:
        """Return the descriptor's number; -1 once closed."""
        return self._fd

    def close(self) -> None:
        """Close the children, then this. A VM ends when it and all its children are closed."""
        while self._children:
            self._children[-1].close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._release()
            os.close(fd)
            if self._owner is not None:
                self._owner._children.remove(self)

    def _release(self) -> None:
        """Release resources of the descriptor, such as mappings. Called once, before it is closed."""

    def attempt(self, request: Ioctl, argument: int | CData = 0, /, **values: Value) -> tuple[int, int]:
        """Return the call's result (-1: failed) and errno (0: succeeded), for callers that expect failures.

        Raises TypeError unless ``argument`` has the type of ``request``, or is an integer if it has none.
        """
        wanted = request.argument
        if wanted is None:
            if not isinstance(argument, int):
                raise TypeError(f"{request.name} takes an integer, not {type(argument).__name__}")
        elif not isinstance(argument, wanted):
            raise TypeError(f"{request.name} takes a {wanted.__name__}, not {type(argument).__name__}")
        return self.kernel.ioctl(self, request, argument, values)

    def call(self, request: Ioctl, argument: int | CData = 0, /, **values: Value) -> int:
        """Make the call and return its result. If it fails, raises KvmError with ``values`` in the message.

        Repeats a call that a signal interrupted.
        """
        while True:
            result, errno = self.attempt(request, argument, **values)
            if not errno:
                return result
            if errno != _errno.EINTR:
                raise self.error(request.name, errno, **values)

    def error(self, call: str, errno: int, /, **values: Value) -> KvmError:
        """Return the KvmError for a failed call on this descriptor."""
        try:
            from pyvmm.kvm.causes import kvm_error  # a table that most runs never need
        except OSError as unread:  # no descriptor left to read it, which may also be why the call failed
            return KvmError(call, self.label, errno, f"no explanation: {unread.strerror}", "raise `ulimit -n`")
        return kvm_error(call, errno, {"": self.label} | values)


class AttributeFd(Fd):
    """An Fd with device attributes (Documentation/virt/kvm/devices): a device, a VM or a vCPU."""

    def set_attr(self, group: int, attr: int, value: CData | None = None) -> None:
        """Write an attribute. ``value`` is a ctypes object of the attribute's size, or None for a plain command."""
        address = 0 if value is None else addressof(value)
        argument = kvm_device_attr(group=group, attr=attr, addr=address)
        self.call(KVM_SET_DEVICE_ATTR, argument, group=group, attr=attr, **_value_argument(value))

    def get_attr(self, group: int, attr: int, value: CData) -> None:
        """Read an attribute into ``value``, a ctypes object of the attribute's size."""
        argument = kvm_device_attr(group=group, attr=attr, addr=addressof(value))
        self.call(KVM_GET_DEVICE_ATTR, argument, group=group, attr=attr, size=sizeof(value))


def _value_argument(value: CData | None) -> dict[str, Value]:
    if isinstance(value, _SimpleCData):
        return {"value": value.value}
    return {} if value is None else {"value": type(value).__name__}
