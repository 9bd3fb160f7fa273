# SPDX-License-Identifier: Apache-2.0
"""Requests of ioctl(2) as objects that know their name and the structure they carry (asm-generic/ioctl.h)."""

from __future__ import annotations

from ctypes import sizeof

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import Structure, Union, _SimpleCData
    from typing import Any, TypeAlias

    Argument: TypeAlias = type[Structure] | type[Union] | type[_SimpleCData[Any]]

_IOC_NONE, _IOC_WRITE, _IOC_READ = 0, 1, 2
_SIZE_BITS = 14


class Ioctl:
    """A request: its kernel ``name``, its ``number``, and the C type its argument points to.

    ``argument`` None means that the argument is a plain integer, or that there is none. The constructor raises
    ValueError if the size in the number differs from the type's size. Such a request would make the kernel read or
    write wrong bytes.
    """

    __slots__ = ("argument", "name", "number")

    def __init__(self, name: str, number: int, argument: Argument | None = None) -> None:
        if not 0 <= number < 1 << 32:
            raise ValueError(f"{name}: {number:#x} is not a 32-bit ioctl number")
        size = number >> 16 & (1 << _SIZE_BITS) - 1
        if size != (0 if argument is None else sizeof(argument)):
            carried = "no structure" if argument is None else f"{argument.__name__} of {sizeof(argument)} bytes"
            raise ValueError(f"{name}: the number says {size} bytes, but it carries {carried}")
        self.name = name
        self.number = number
        self.argument = argument

    def __repr__(self) -> str:
        return f"<{self.name} {self.number:#010x}>"


def _ioc(name: str, direction: int, group: int, nr: int, argument: Argument | None) -> Ioctl:
    size = 0 if argument is None else sizeof(argument)
    if size >= 1 << _SIZE_BITS:
        raise ValueError(f"{name}: {size} bytes do not fit an ioctl number's {_SIZE_BITS} bits")
    if not (0 <= group <= 0xFF and 0 <= nr <= 0xFF):
        raise ValueError(f"{name}: group {group:#x} and number {nr:#x} are bytes")
    return Ioctl(name, direction << 30 | size << 16 | group << 8 | nr, argument)


def IO(name: str, group: int, nr: int) -> Ioctl:
    """Make a request without a structure: ``_IO(group, nr)``."""
    return _ioc(name, _IOC_NONE, group, nr, None)


def IOR(name: str, group: int, nr: int, argument: Argument) -> Ioctl:
    """Make a request whose structure the kernel fills, as its header says: ``_IOR(group, nr, argument)``."""
    return _ioc(name, _IOC_READ, group, nr, argument)


def IOW(name: str, group: int, nr: int, argument: Argument) -> Ioctl:
    """Make a request whose structure the kernel reads, as its header says: ``_IOW(group, nr, argument)``."""
    return _ioc(name, _IOC_WRITE, group, nr, argument)


def IOWR(name: str, group: int, nr: int, argument: Argument) -> Ioctl:
    """Make a request whose structure the kernel reads and fills: ``_IOWR(group, nr, argument)``."""
    return _ioc(name, _IOC_READ | _IOC_WRITE, group, nr, argument)
