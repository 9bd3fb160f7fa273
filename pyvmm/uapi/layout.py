# SPDX-License-Identifier: Apache-2.0
"""C structures written as annotated classes, so that a field's C type and its Python type are said once.

::

    @layout
    class kvm_mp_state(Structure):
        mp_state: u32

Modules that use it do without ``from __future__ import annotations``: the annotations are the C types, as objects.
Nested structures without a name in C have one here that starts with an underscore, as have paddings the C compiler
inserts; both belong to their parent and are no part of the interface.
"""

from collections.abc import Iterable
from ctypes import (
    Structure,
    Union,
    alignment,
    c_int16,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    sizeof,
)
from typing import Annotated, Any, TypeAlias, TypeVar

u8: TypeAlias = Annotated[int, c_uint8]
u16: TypeAlias = Annotated[int, c_uint16]
u32: TypeAlias = Annotated[int, c_uint32]
u64: TypeAlias = Annotated[int, c_uint64]
s16: TypeAlias = Annotated[int, c_int16]
s32: TypeAlias = Annotated[int, c_int32]
s64: TypeAlias = Annotated[int, c_int64]

T = TypeVar("T", bound=type[Structure] | type[Union])
S = TypeVar("S", bound=Structure)


def layout(cls: T) -> T:
    """Give ``cls`` the fields its annotations name, in their order and with the C compiler's alignment."""
    cls._fields_ = [(name, getattr(hint, "__metadata__", (hint,))[0]) for name, hint in cls.__annotations__.items()]
    return cls


def with_tail(header: type[S], name: str, items: Iterable[Any], element: Any) -> S:
    """Make ``header`` with the flexible array ``name`` behind it, filled with ``items`` of the C type ``element``.

    For arguments such as ``struct kvm_irq_routing``, whose ioctl number knows only the header. ValueError if the C
    compiler would leave a gap between the two.
    """
    values = list(items)
    if sizeof(header) % alignment(element):
        raise ValueError(f"{header.__name__}: {element.__name__} would not follow its {sizeof(header)} bytes directly")
    kind: Any = type(header.__name__, (header,), {"_fields_": [(name, element * len(values))]})
    whole: S = kind()
    getattr(whole, name)[:] = values
    return whole


def offset_of(kind: type[Structure], path: str) -> int:
    """Return the offset in bytes of a field, ``"a.b"`` for one inside another."""
    first, _, rest = path.partition(".")
    offset: int = getattr(kind, first).offset
    return offset + (offset_of(dict(kind._fields_)[first], rest) if rest else 0)  # type: ignore[arg-type]
