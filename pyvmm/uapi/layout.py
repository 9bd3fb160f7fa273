# SPDX-License-Identifier: Apache-2.0
"""C structures as annotated classes, which define a field's C type and its Python type at once.

::

    @layout(features=7)
    class kvm_vcpu_init(Structure):
        target: u32
        features: Array[c_uint32]

Nested structures without a name in C, and the C compiler's paddings, have names with a leading underscore here. Both
belong to their parent and are not part of the interface.
"""

from __future__ import annotations

import sys
from ctypes import alignment, c_int16, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p, sizeof

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from ctypes import Structure, Union
    from typing import Any, TypeAlias, TypeVar

    u8: TypeAlias = int
    u16: TypeAlias = int
    u32: TypeAlias = int
    u64: TypeAlias = int
    s16: TypeAlias = int
    s32: TypeAlias = int
    s64: TypeAlias = int
    pointer: TypeAlias = int | None

    T = TypeVar("T", bound=type[Structure] | type[Union])
    S = TypeVar("S", bound=Structure)

_TYPES = {
    "u8": c_uint8,
    "u16": c_uint16,
    "u32": c_uint32,
    "u64": c_uint64,
    "s16": c_int16,
    "s32": c_int32,
    "s64": c_int64,
    "pointer": c_void_p,
    "Array[c_uint8]": c_uint8,
    "Array[c_uint16]": c_uint16,
    "Array[c_uint32]": c_uint32,
    "Array[c_uint64]": c_uint64,
}


def layout(**lengths: int) -> Callable[[T], T]:
    """Give a class the fields of its annotations, in order and with the C compiler's alignment.

    ``lengths`` are those of its arrays. A field that is a structure is annotated with one of the same module.
    """

    def laid_out(cls: T) -> T:
        module = vars(sys.modules[cls.__module__])
        fields: list[Any] = []
        for name, said in cls.__annotations__.items():
            kind: Any = _TYPES.get(said) or module[said]
            fields.append((name, kind * lengths[name] if name in lengths else kind))
        cls._fields_ = fields
        return cls

    return laid_out


def with_tail(header: type[S], name: str, items: Iterable[Any], element: Any) -> S:
    """Make ``header`` followed by the flexible array ``name``, filled with ``items`` of the C type ``element``.

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
