# SPDX-License-Identifier: Apache-2.0
"""Write pyvmm/_native.pyi from the loop's declarations. ``python native/build.py`` calls it after a build in place.

cffi's parser gives structures, fields and types. The text of the declarations adds the rest: the names of constants in
their order, those of parameters, and ``const``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WIDTH = 120
NUMBERS = ("uint8_t", "uint32_t", "uint64_t")

HEAD = '''# SPDX-License-Identifier: Apache-2.0
"""The native loop's interface for Python. native/*/cdef.h document every structure, constant and function.

native/stubs.py writes this file. A class here that is named as a structure is one, and a pointer to one: fields are
reached alike through both. Structures are cffi's (``ffi.new("struct pv_vm *")``); whoever allocates one keeps it alive.
At run time the module has ``ffi`` and ``lib`` alone, so import a structure's name where ``TYPE_CHECKING`` only.

Every call releases the GIL. One that takes a buffer takes ``bytes`` where C only reads, else cdata.
"""

from collections.abc import Iterable, Iterator
from typing import (
    Any,
    Final,
    Generic,
    Literal,
    Self,
    SupportsIndex,
    TypeAlias,
    TypeVar,
    final,
    overload,
    type_check_only,
)

from typing_extensions import Buffer

_T = TypeVar("_T")
_S = TypeVar("_S", bound=CData)

@type_check_only
class CData:
    """A C structure, pointer or array; false for a null pointer."""

    def __bool__(self) -> bool: ...

@type_check_only
class Pointer(CData, Generic[_T]):
    """A pointer to one or more values."""

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> _T: ...
    @overload
    def __getitem__(self, index: slice, /) -> Array[_T]: ...
    @overload
    def __setitem__(self, index: SupportsIndex, value: _T, /) -> None: ...
    @overload
    def __setitem__(self, index: slice, value: Iterable[_T], /) -> None: ...
    def __add__(self, steps: int, /) -> Pointer[_T]: ...

@type_check_only
class Array(Pointer[_T]):
    """An array, which C takes as a pointer."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[_T]: ...

@type_check_only
class Struct(CData):
    """A structure, or a pointer to one or to the first of several."""

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> Self: ...
    @overload
    def __getitem__(self, index: slice, /) -> Array[Self]: ...
    def __add__(self, steps: int, /) -> Self: ...

_Ref: TypeAlias = _T | Array[_T]

@type_check_only
class _To(Generic[_T]):
    """A field that is a pointer to one or more structures."""

    def __get__(self, of: object, kind: object = ..., /) -> _T: ...
    def __set__(self, of: object, value: _Ref[_T], /) -> None: ...

@type_check_only
class _Items(Generic[_T]):
    """A field that is an array."""

    def __get__(self, of: object, kind: object = ..., /) -> Array[_T]: ...
    def __set__(self, of: object, value: Iterable[_T], /) -> None: ...

@type_check_only
@final
class Number(CData):
    """A pointer as a number."""

    def __int__(self) -> int: ...

@type_check_only
@final
class _Buffer(Buffer):
    """Memory behind a cdata, without a copy."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int | slice) -> bytes: ...
    def __setitem__(self, index: int | slice, value: Buffer) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
'''

FFI = """
@type_check_only
@final
class _Ffi:
    NULL: Final[Any]
{new}    @overload
    def new(self, cdecl: str, init: object = ...) -> Any: ...
{cast}    @overload
    def cast(self, cdecl: Literal["uintptr_t"], value: object) -> Number: ...
    @overload
    def cast(self, cdecl: Literal["void *"], value: object) -> CData: ...
    @overload
    def cast(self, cdecl: str, value: object) -> Any: ...
    def string(self, cdata: CData, maxlen: int = ...) -> bytes: ...
    def buffer(self, cdata: CData, size: int = ...) -> _Buffer: ...
    @overload
    def from_buffer(self, cdecl: Literal["uint8_t[]"], buffer: Buffer, require_writable: bool = ...) -> Array[int]: ...
    @overload
    def from_buffer(self, cdecl: str, buffer: Buffer, require_writable: bool = ...) -> Any: ...
    def release(self, cdata: CData) -> None: ...
    def memmove(self, dest: CData | Buffer, src: CData | Buffer, n: int) -> None: ...
    @overload
    def addressof(self, cdata: _S, /) -> _S: ...
    @overload
    def addressof(self, cdata: CData, *fields: str | int) -> Any: ...
    def offsetof(self, cdecl: str, *fields: str | int) -> int: ...
    def sizeof(self, cdecl: str | CData) -> int: ...
    def typeof(self, cdecl: str | CData) -> Any: ...
    def list_types(self) -> tuple[list[str], list[str], list[str]]: ...
"""

TAIL = """
ffi: Final[_Ffi]
lib: Final[_Lib]
"""


def write_stub(declarations: str, path: Path) -> None:
    """Write the stub of ``declarations`` to ``path`` if it differs."""
    text = stub(declarations)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def stub(declarations: str) -> str:
    """Return the typing stub of a module with these ``declarations``."""
    from cffi import FFI as Ffi

    ffi = Ffi()
    ffi.cdef(declarations)
    plain = re.sub(r"/\*.*?\*/", " ", declarations, flags=re.DOTALL)
    structures = re.findall(r"^struct (\w+) \{", plain, flags=re.MULTILINE)
    lines = [HEAD.rstrip("\n")]
    for name in structures:
        lines += ["", "@type_check_only", "@final", f"class {name}(Struct):"]
        lines += [f"    {field}: {_field(found.type)}" for field, found in ffi.typeof(f"struct {name}").fields or ()]
    kinds = {f"struct {name}": name for name in structures}
    new = "".join(
        _overload("new", f"{kind}{end}", "init: object = ...", result)
        for kind, name in (kinds | dict.fromkeys(NUMBERS, "int")).items()
        for end, result in ((" *", name if kind in kinds else "Pointer[int]"), ("[]", f"Array[{name}]"))
    )
    cast = "".join(_overload("cast", f"{kind} *", "value: object", name) for kind, name in kinds.items())
    cast += "".join(_overload("cast", f"{kind} *", "value: object", "Pointer[int]") for kind in NUMBERS)
    lines.append(FFI.format(new=new, cast=cast).rstrip("\n"))
    lines += ["", "@type_check_only", "@final", "class _Lib:"]
    for values in re.findall(r"^enum\s*\w*\s*\{(.*?)\}", plain, flags=re.MULTILINE | re.DOTALL):
        lines += [f"    {value.split('=')[0].strip()}: Final[int]" for value in values.split(",") if value.strip()]
        lines.append("")
    variables = re.findall(r"^extern \w+ (\w+);", plain, flags=re.MULTILINE)
    lines += [f"    {name}: int" for name in variables]
    lines += _functions(ffi, plain)
    return "\n".join(lines) + "\n" + TAIL


def _overload(function: str, cdecl: str, more: str, result: str) -> str:
    return f'    @overload\n    def {function}(self, cdecl: Literal["{cdecl}"], {more}) -> {result}: ...\n'


def _name(kind: Any) -> str:
    """Return the Python name of a type that is not a pointer or array in Python."""
    if kind.kind == "primitive":
        return "int"
    if kind.kind == "pointer":
        return f"Pointer[{_name(kind.item)}]" if kind.item.kind == "primitive" else _name(kind.item)
    if kind.kind == "void":
        return "CData"
    return str(kind.cname).removeprefix("struct ")


def _field(kind: Any) -> str:
    if kind.kind == "array":
        return f"_Items[{_name(kind.item)}]"
    if kind.kind == "pointer" and kind.item.kind == "struct":
        return f"_To[{_name(kind)}]"
    return _name(kind)


def _functions(ffi: Any, plain: str) -> Iterator[str]:
    flat = " ".join(re.sub(r"\{.*?\}", " ", plain, flags=re.DOTALL).split())
    for result, name, listed in re.findall(r"([\w ]+[ *])(pv_\w+)\(([^()]*)\);", flat):
        taken = [_parameter(ffi, text.strip()) for text in listed.split(",") if text.strip() != "void"]
        returned = ffi.typeof(result.split(";")[-1].replace("const ", "").strip())
        given = "None" if returned.kind == "void" else "CData" if returned.kind == "pointer" else _name(returned)
        inside = ", ".join(["self", *taken, *(["/"] if taken else [])])
        line = f"    def {name}({inside}) -> {given}: ..."
        if len(line) <= WIDTH:
            yield line
        else:
            yield from (f"    def {name}(", f"        {inside}", f"    ) -> {given}: ...")


def _parameter(ffi: Any, text: str) -> str:
    found = re.fullmatch(r"(const )?(.*?[ *])(\w+)", text)
    assert found is not None, text
    constant, kind = bool(found[1]), ffi.typeof(found[2].strip())
    named = _name(kind)
    if kind.kind == "pointer" and kind.item.kind == "struct":
        named = f"_Ref[{named}]"
    elif constant and kind.item.cname in ("void", "uint8_t", "unsigned char"):
        named = f"bytes | {named}"
    name = {"from": "source", "map": "table"}.get(found[3], found[3])
    return f"{name}: {named}"
