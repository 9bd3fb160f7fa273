# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from ctypes import Structure, c_uint8, c_uint16, c_uint64, sizeof
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyvmm.uapi
from pyvmm.uapi import kvm_cap, psci
from pyvmm.uapi.ioctl import IO, IOR, IOW, IOWR, Ioctl
from pyvmm.uapi.kvm import KVM_REG_SIZE, KVM_RUN
from pyvmm.uapi.kvm_arm64 import core_reg
from pyvmm.uapi.kvm_run import kvm_run
from pyvmm.uapi.kvm_state import KVM_GET_REG_LIST, kvm_reg_list
from pyvmm.uapi.layout import layout, with_tail

if TYPE_CHECKING:
    from ctypes import Array

    from pyvmm.uapi.layout import u8, u64


@layout()
class Small(Structure):
    first: u8
    second: u64


@layout(few=3)
class Nest(Structure):
    few: Array[c_uint16]
    small: Small


def offset_of(kind: type[Structure], field: str) -> int:
    offset: int = getattr(kind, field).offset
    return offset


def test_a_request_knows_its_name_number_and_structure() -> None:
    request = IOWR("SMALL", 0xAE, 0x12, Small)
    assert (request.name, request.number, request.argument) == ("SMALL", 3 << 30 | 16 << 16 | 0xAE12, Small)
    assert repr(request) == "<SMALL 0xc010ae12>"
    assert IOR("R", 0xAE, 1, Small).number >> 30 == 2
    assert IOW("W", 0xAE, 1, Small).number >> 30 == 1
    assert IO("N", 0xAE, 1).number == 0xAE01


def test_a_request_whose_number_encodes_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="the number says 8 bytes, but it carries Small of 16 bytes"):
        Ioctl("WRONG", 1 << 30 | 8 << 16, Small)
    with pytest.raises(ValueError, match="no structure"):
        Ioctl("WRONG", 1 << 30 | 8 << 16)
    with pytest.raises(ValueError, match="16 bytes"):
        Ioctl("WRONG", 0xAE01, Small)
    with pytest.raises(ValueError, match="32-bit"):
        Ioctl("WRONG", 1 << 32)


def test_a_structure_too_big_for_a_request_is_refused() -> None:
    fits, too_big = c_uint8 * (2**14 - 1), c_uint8 * 2**14
    assert IOW("FITS", 1, 1, fits).number >> 16 & 0x3FFF == 2**14 - 1  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="16384 bytes do not fit"):
        IOW("BIG", 1, 1, too_big)  # type: ignore[arg-type]


@pytest.mark.parametrize(("group", "nr"), [(256, 0), (0, 256), (-1, 0), (0, -1)])
def test_group_and_number_must_fit_a_byte(group: int, nr: int) -> None:
    with pytest.raises(ValueError, match="are bytes"):
        IO("WRONG", group, nr)


def test_annotations_define_the_same_layout_as_c() -> None:
    assert sizeof(Small) == 16
    assert (offset_of(Small, "first"), offset_of(Small, "second")) == (0, 8)
    assert sizeof(Nest) == 24
    assert (offset_of(Nest, "few"), offset_of(Nest, "small")) == (0, 8)
    assert list(Nest(few=(1, 2, 3)).few) == [1, 2, 3]
    assert offset_of(kvm_run, "s") == offset_of(kvm_run, "kvm_valid_regs") + 16


def test_a_tail_follows_its_header_without_a_gap() -> None:
    whole = with_tail(kvm_reg_list, "reg", [7, 2**64 - 1], c_uint64)
    whole.n = 2
    assert bytes(whole) == b"\2" + bytes(7) + b"\7" + bytes(7) + b"\xff" * 8
    assert isinstance(whole, KVM_GET_REG_LIST.argument)  # type: ignore[arg-type]
    assert sizeof(with_tail(kvm_reg_list, "reg", [], c_uint64)) == 8


def test_a_tail_that_c_would_put_elsewhere_is_refused() -> None:
    class Odd(Structure):
        _fields_ = (("n", c_uint16),)

    with pytest.raises(ValueError, match="would not follow its 2 bytes"):
        with_tail(Odd, "tail", [1], c_uint64)


def test_core_registers_have_their_architectural_names() -> None:
    assert core_reg("x0") == 0x6030_0000_0010_0000
    assert core_reg("pc") == 0x6030_0000_0010_0040
    names = ["sp", "pc", "pstate", "sp_el1", "elr_el1", "spsr_el1", "fpsr", "fpcr"]
    names += [f"x{n}" for n in range(31)] + [f"v{n}" for n in range(32)]
    assert len({core_reg(name) for name in names}) == len(names)
    assert {KVM_REG_SIZE(core_reg(f"v{n}")) for n in range(32)} == {16}


@pytest.mark.parametrize("name", ["x31", "v32", "x-1", "x", "x01", "w0", "", "PC", "x²", "fp"])
def test_no_other_name_is_taken_for_a_register(name: str) -> None:
    with pytest.raises(KeyError, match="no core register is called"):
        core_reg(name)


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
def test_a_psci_version_splits_into_major_and_minor(major: int, minor: int) -> None:
    version = psci.PSCI_VERSION(major, minor)
    assert (version >> psci.PSCI_VERSION_MAJOR_SHIFT, version & psci.PSCI_VERSION_MINOR_MASK) == (major, minor)


def test_known_capabilities_have_names_and_unknown_ones_numbers() -> None:
    assert kvm_cap.cap_name(kvm_cap.KVM_CAP_GUEST_MEMFD) == "KVM_CAP_GUEST_MEMFD"
    assert kvm_cap.cap_name(9999) == "9999"


def test_no_two_requests_have_the_same_name_or_the_same_number_and_structure() -> None:
    modules: list[Any] = [
        importlib.import_module(f"pyvmm.uapi.{info.name}") for info in pkgutil.iter_modules(pyvmm.uapi.__path__)
    ]
    requests = {thing for module in modules for thing in vars(module).values() if isinstance(thing, Ioctl)}
    assert KVM_RUN in requests
    assert len({(request.name, request.argument) for request in requests}) == len(requests)


def test_the_bindings_import_nothing_heavy() -> None:
    """Every run imports the bindings: under emulation every module costs noticeable time."""
    heavy = {"asyncio", "subprocess", "logging", "dataclasses", "inspect", "json", "pathlib", "fcntl", "mmap", "cffi"}
    code = "import sys; import pyvmm.kvm.system; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert heavy.isdisjoint(loaded.stdout.split())
