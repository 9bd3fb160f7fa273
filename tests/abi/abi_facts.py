# SPDX-License-Identifier: Apache-2.0
"""The claims of pyvmm.uapi as C expressions with the number expected for each, and a compiler's values for them.

Walks the modules, so that every new definition is tested: every structure's size, every field's offset, size and sign,
every request's number, every constant. The values are read from an object file: compiled code is never run.
"""

from __future__ import annotations

import importlib
import pkgutil
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from ctypes import Structure, Union, _SimpleCData, c_void_p, sizeof
from enum import IntEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple

import pyvmm.uapi
from tests.abi import abi_headers

MACHINES = ("x86_64", "aarch64")
OWN = {"layout", "ioctl"}  # what the other claims are written with
ONLY_ON = {"kvm_x86": "x86_64", "kvm_arm64": "aarch64", "kvm_arm64_vcpu": "aarch64", "psci": "aarch64"}

# Capabilities that the common header defines for x86 only.
X86_CAPABILITIES = {
    f"KVM_CAP_{name}" for name in ("REINJECT_CONTROL", "MCE", "PIT2", "PIT_STATE2", "DEBUGREGS", "XSAVE", "XCRS")
}

# The name of a field in C where it differs from the name here, and the architecture that has the field.
RENAMED = {
    ("kvm_run", "debug_arm64"): ("debug.arch", "aarch64"),
    ("kvm_run", "debug_x86"): ("debug.arch", "x86_64"),
}

PRELUDE = """
#define SZ_64K 0x10000
#define BIT(n) (1UL << (n))
#define offsetof(type, member) __builtin_offsetof(type, member)
#include <linux/kvm.h>
#include <linux/psci.h>
#include <linux/memfd.h>
#include <linux/errno.h>
#include <linux/falloc.h>
#include <linux/fcntl.h>
#include <linux/fs.h>
#include <linux/if_tun.h>
#include <linux/magic.h>
#include <linux/sockios.h>
#include <linux/mman.h>
#include <linux/prctl.h>
#include <linux/userfaultfd.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <linux/sched.h>
#include <linux/socket.h>
#include <asm/termbits.h>
#include <asm/ioctls.h>
#include <asm/unistd.h>
"""


class Fact(NamedTuple):
    """A C expression, and the number that pyvmm has for it, modulo 2^64."""

    expression: str
    value: int


def modules(machine: str) -> Iterator[ModuleType]:
    """Import and return the modules of pyvmm.uapi whose headers exist for ``machine``."""
    for info in pkgutil.iter_modules(pyvmm.uapi.__path__):
        if info.name not in OWN and ONLY_ON.get(info.name, machine) == machine:
            yield importlib.import_module(f"pyvmm.uapi.{info.name}")


def own(module: ModuleType) -> dict[str, Any]:
    """Return the public names that ``module`` defines itself."""
    return {
        name: thing
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", module.__name__) == module.__name__
    }


def structures(machine: str) -> dict[str, type[Structure]]:
    """Return every structure of the interface by its C name."""
    found: dict[str, type[Structure]] = {}
    for module in modules(machine):
        kinds = [thing for thing in own(module).values() if isinstance(thing, type) and issubclass(thing, Structure)]
        found |= {kind.__name__: kind for kind in kinds}
    return found


def structure_facts(kind: type[Structure], machine: str, name: str | None = None) -> Iterator[Fact]:
    """Claim that C's ``struct name`` has the size and the fields of ``kind``."""
    name = name or kind.__name__
    yield Fact(f"sizeof(struct {name})", sizeof(kind))
    for path, offset, field in fields(kind):
        path, only = RENAMED.get((name, path), (path, machine))
        if only != machine:
            continue
        yield Fact(f"offsetof(struct {name}, {path})", offset)
        member = f"((struct {name} *)0)->{path}"
        yield Fact(f"sizeof({member})", sizeof(field))
        if issubclass(field, _SimpleCData) and field is not c_void_p:
            yield Fact(f"((__typeof__({member}))-1 < 0)", int(field(-1).value < 0))


def fields(kind: Any, prefix: str = "", base: int = 0) -> Iterator[tuple[str, int, Any]]:
    """Return the C path, offset and type of every field. Fields of nameless members count as their parent's."""
    nameless = getattr(kind, "_anonymous_", ())
    for name, field, *_ in kind._fields_:
        offset = base + getattr(kind, name).offset
        inner = issubclass(field, Structure | Union) and field.__name__.startswith("_")
        if name in nameless:
            yield from fields(field, prefix, offset)
        elif not name.startswith("_"):
            yield prefix + name, offset, field
            if inner:
                yield from fields(field, f"{prefix}{name}.", offset)


def constant_facts(machine: str) -> Iterator[Fact]:
    """Claim the number of every constant, enumerator and request."""
    for module in modules(machine):
        for name, thing in vars(module).items():
            if name.isupper() or re.match(r"[A-Z][A-Za-z0-9]*_", name):
                if machine != "x86_64" and name in X86_CAPABILITIES:
                    continue
                if type(thing) is int:
                    yield Fact(name, thing)
                elif type(thing).__name__ == "Ioctl":
                    yield Fact(thing.name, thing.number)
            if isinstance(thing, type) and issubclass(thing, IntEnum) and thing.__module__ == module.__name__:
                yield from (Fact(member.name, member.value) for member in thing)


def measure(expressions: list[str], machine: str) -> list[int]:
    """Have the compiler for ``machine`` evaluate each expression; the numbers are modulo 2^64."""
    compiler, objcopy = tools(machine)
    rows = "".join(f"    (unsigned long long)({expression}),\n" for expression in expressions)
    table = '__attribute__((used, section("pyvmm_abi"))) const unsigned long long answers[]'
    source = f"{PRELUDE}\n{table} = {{\n{rows}}};\n"
    with TemporaryDirectory(prefix="pyvmm-abi-") as folder:
        c, o, binary = (Path(folder, f"abi.{suffix}") for suffix in ("c", "o", "bin"))
        c.write_text(source)
        flags = ["-std=gnu11", "-ffreestanding", "-w", *abi_headers.include_flags(machine)]
        subprocess.run([compiler, *flags, "-c", c, "-o", o], check=True)
        subprocess.run([objcopy, "-O", "binary", "-j", "pyvmm_abi", o, binary], check=True)
        return list(memoryview(binary.read_bytes()).cast("Q"))


def macros(machine: str) -> set[str]:
    """Return the name of every macro the headers define."""
    compiler, _ = tools(machine)
    flags = ["-E", "-dM", "-x", "c", "-", *abi_headers.include_flags(machine)]
    listing = subprocess.run([compiler, *flags], check=True, capture_output=True, text=True, input=PRELUDE).stdout
    return set(re.findall(r"^#define (\w+)", listing, re.MULTILINE))


def tools(machine: str) -> tuple[str, str]:
    """Return the C compiler and the objcopy for ``machine``; LookupError if they are not installed."""
    prefix = "" if platform.machine() == machine else f"{machine}-linux-gnu-"
    names = (f"{prefix}gcc", f"{prefix}objcopy")
    for name in names:
        if shutil.which(name) is None:
            package = f"gcc-{machine.replace('_', '-')}-linux-gnu" if prefix else "gcc"
            raise LookupError(f"{name} is not installed (apt install {package})")
    return names
