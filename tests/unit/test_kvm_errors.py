# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from ctypes import c_int, c_uint32
from pathlib import Path
from typing import Any

import pytest

from pyvmm.errors import HostError, KvmError
from pyvmm.kvm.causes import CAUSES, explain, kvm_error
from pyvmm.kvm.device import KvmDevice
from pyvmm.kvm.fd import AttributeFd, Fd
from pyvmm.kvm.system import System
from pyvmm.uapi import kvm, kvm_arm64, kvm_arm64_vcpu, kvm_irq, kvm_memory, kvm_state, kvm_x86
from pyvmm.uapi.errno import EHWPOISON
from pyvmm.uapi.ioctl import Ioctl
from pyvmm.uapi.kvm import DeviceType

REQUESTS = {
    thing.name
    for module in (kvm, kvm_arm64, kvm_arm64_vcpu, kvm_irq, kvm_memory, kvm_state, kvm_x86)
    for thing in vars(module).values()
    if isinstance(thing, Ioctl)
}


@pytest.fixture
def pipe() -> Iterator[Fd]:
    """Return an Fd whose file has no KVM requests."""
    read, write = os.pipe()
    os.close(write)
    with Fd(read) as fd:
        yield fd


@pytest.mark.parametrize(
    ("call", "number", "values", "cause", "hint"),
    [
        ("KVM_CREATE_VM", errno.EINVAL, {"type": 1 << 31}, "does not run pKVM", "kvm-arm.mode=protected"),
        ("KVM_CREATE_VM", errno.EINVAL, {"type": 99}, "machine type", "type 0"),
        ("KVM_CREATE_VM", errno.ENOMEM, {"type": 0}, "255 VMs", "end other"),
        ("KVM_CREATE_VCPU", errno.EBUSY, {"index": 2}, "already initialised", "before"),
        ("KVM_SET_USER_MEMORY_REGION", errno.EEXIST, {"slot": 1, "size": 4096}, "overlaps", "delete that slot"),
        ("KVM_SET_USER_MEMORY_REGION", errno.EINVAL, {"gpa": 1, "size": 4096}, "multiples of 4096", None),
        ("KVM_SET_USER_MEMORY_REGION2", errno.EINVAL, {"offset": 8, "size": 4096}, "multiples of 4096", None),
        ("KVM_SET_USER_MEMORY_REGION", errno.EINVAL, {"slot": 1, "size": 0}, "no such slot to delete", None),
        (
            "KVM_SET_USER_MEMORY_REGION2",
            errno.EINVAL,
            {"flags": 4, "size": 4096, "memfd_flags": 1},
            "can only be deleted, not changed",
            None,
        ),
        ("KVM_SET_USER_MEMORY_REGION", errno.EPERM, {"slot": 1, "size": 0}, "once it has run", "only add slots"),
        ("KVM_SET_USER_MEMORY_REGION", errno.EFAULT, {"gpa": 1 << 45, "size": 4096}, "address bits", "max_ipa_bits"),
        ("KVM_SET_USER_MEMORY_REGION2", errno.ENOTTY, {"size": 4096}, "older than 6.8", None),
        ("KVM_SET_USER_MEMORY_REGION2", errno.EINVAL, {"size": 1 << 20, "flags": 4, "memfd_flags": 0}, "MMAP", "pass"),
        ("KVM_ARM_VCPU_INIT", errno.ENOENT, {}, "does not know this feature", "KVM_ARM_VCPU"),
        ("KVM_CREATE_GUEST_MEMFD", errno.EINVAL, {"size": 100, "flags": 1}, "multiple of 4096", None),
        ("KVM_CREATE_GUEST_MEMFD", errno.EINVAL, {"size": 4096, "flags": 65}, "does not know these flags", "FLAGS"),
        ("KVM_SET_DEVICE_ATTR", errno.EINVAL, {"attr": "KVM_ARM_VM_SMCCC_FILTER"}, "no SMCCC filter", "emulated"),
        ("KVM_SET_ONE_REG", errno.ENOEXEC, {"id": 1}, "not initialised", "init()"),
        ("KVM_RUN", errno.ENOMEM, {}, "RLIMIT_MEMLOCK", "ulimit -l"),
        ("KVM_RUN", EHWPOISON, {}, "broken memory", None),
        ("KVM_GET_MP_STATE", errno.EIO, {}, "another process", "not forks"),
        ("KVM_GET_REGS", errno.EBADF, {}, "it is closed", None),
    ],
)
def test_a_known_failure_has_an_explanation(
    call: str, number: int, values: dict[str, Any], cause: str, hint: str | None
) -> None:
    text, advice = explain(call, number, values)
    assert text is not None
    assert cause in text
    assert advice is None if hint is None else hint in (advice or "")


def test_an_unknown_failure_gets_no_invented_cause() -> None:
    assert explain("KVM_GET_MP_STATE", errno.EDOM, {}) == (None, None)
    assert explain("KVM_SET_DEVICE_ATTR", errno.EINVAL, {"group": 0, "attr": 2}) == (None, None)


def test_every_cause_is_of_a_request_that_exists() -> None:
    named = {call for cause in CAUSES for call in cause.calls.split()} - {"*"}
    assert named <= REQUESTS


def test_values_are_written_in_the_form_for_their_kind() -> None:
    values: dict[str, int | str | None] = {
        "": "vm=7",
        "slot": 3,
        "gpa": 0x8000_0000,
        "offset": None,
        "type": DeviceType.KVM_DEV_TYPE_VFIO,
    }
    error = kvm_error("KVM_RUN", errno.EPERM, values)
    assert error.values == "vm=7, slot=3, gpa=0x8000_0000, type=KVM_DEV_TYPE_VFIO"


def test_the_error_of_a_failing_call_has_its_name_and_values(pipe: Fd) -> None:
    with pytest.raises(KvmError, match=r"^KVM_CREATE_VCPU\(fd=\d+, index=3\): ENOTTY: ") as caught:
        pipe.call(kvm.KVM_CREATE_VCPU, 3, index=3)
    assert caught.value.errno == errno.ENOTTY


def test_reporting_a_lack_of_descriptors_needs_no_descriptor(pipe: Fd, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        @staticmethod
        def find_spec(*_: object) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.delitem(sys.modules, "pyvmm.kvm.causes")
    monkeypatch.setattr(sys, "meta_path", [Full])
    error = pipe.error("KVM_CREATE_VCPU", errno.EMFILE)
    assert error.errno == errno.EMFILE
    assert re.fullmatch(r"KVM_CREATE_VCPU\(fd=\d+\): EMFILE: .*Too many open files", error.message)
    assert error.hint == "raise `ulimit -n`"


def test_an_attempt_returns_the_errno(pipe: Fd) -> None:
    assert pipe.attempt(kvm.KVM_GET_API_VERSION) == (-1, errno.ENOTTY)


def test_an_argument_of_the_wrong_type_never_reaches_the_kernel(pipe: Fd) -> None:
    with pytest.raises(TypeError, match="KVM_CREATE_VM takes an integer, not kvm_mp_state"):
        pipe.attempt(kvm.KVM_CREATE_VM, kvm_state.kvm_mp_state())
    with pytest.raises(TypeError, match="KVM_GET_MP_STATE takes a kvm_mp_state, not int"):
        pipe.attempt(kvm_state.KVM_GET_MP_STATE, 5)
    with pytest.raises(TypeError, match="takes a kvm_mp_state, not kvm_one_reg"):
        pipe.attempt(kvm_state.KVM_GET_MP_STATE, kvm.kvm_one_reg())


def test_closing_twice_closes_once() -> None:
    read, write = os.pipe()
    fd = Fd(read)
    fd.close()
    again = os.dup(write)  # gets the number, which the second close must not close
    assert again == read
    fd.close()
    os.fstat(again)
    os.close(again)
    os.close(write)


def test_using_a_closed_object_is_an_error_that_says_so(pipe: Fd) -> None:
    pipe.close()
    assert pipe.closed
    assert pipe.fileno() == -1
    assert repr(pipe).endswith(" closed>")
    with pytest.raises(KvmError, match="EBADF: it is closed"):
        pipe.call(kvm.KVM_RUN)


def test_closing_an_object_closes_the_objects_made_from_it_newest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(Fd, "_release", lambda self: order.append(self.label))
    parent, *rest = (os.open("/dev/null", os.O_RDONLY) for _ in range(4))
    with Fd(parent) as owner:
        children = [Fd(number, owner) for number in rest]
        children[1].close()
        assert os.path.exists(f"/proc/self/fd/{rest[0]}")
    assert order == [f"fd={n}" for n in (rest[1], rest[2], rest[0], parent)]
    assert not any(os.path.exists(f"/proc/self/fd/{n}") for n in (parent, *rest))


def test_a_device_is_named_after_its_type(pipe: Fd) -> None:
    device = KvmDevice(os.dup(pipe.fileno()), pipe, DeviceType.KVM_DEV_TYPE_ARM_VGIC_V3)
    with pytest.raises(KvmError, match=r"KVM_SET_DEVICE_ATTR\(ARM_VGIC_V3=\d+, group=3, attr=0x0, value=0x60\)"):
        device.set_attr(3, 0, c_uint32(96))
    with pytest.raises(KvmError, match="group=3, attr=0x1"):
        device.get_attr(3, 1, c_int())


def test_accessing_an_attribute_of_a_closed_device_is_an_error(pipe: Fd) -> None:
    device = AttributeFd(os.dup(pipe.fileno()), pipe)
    device.close()
    with pytest.raises(KvmError, match="it is closed"):
        device.set_attr(0, 0)


def test_the_error_on_a_host_without_kvm_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="this host has no KVM") as caught:
        System.open(str(tmp_path / "kvm"))
    assert "pyvmm --lab" in str(caught.value.hint)
    assert "modprobe" in str(caught.value.hint)


def test_the_error_for_a_user_without_permission_names_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HostError, match="may not open /dev/kvm") as caught:
        System.open()
    assert "usermod -aG kvm" in str(caught.value.hint)


def test_a_file_that_is_not_kvm_is_refused() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match="/dev/null is not the KVM that pyvmm knows: it answers ENOTTY"):
        System.open("/dev/null")
    assert len(os.listdir("/proc/self/fd")) == before


def test_another_api_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(System, "attempt", lambda *_: (13, 0))
    with pytest.raises(HostError, match="API version 13 instead of API version 12"):
        System.open("/dev/null")


def test_a_call_that_a_signal_interrupts_is_repeated(pipe: Fd, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([(-1, errno.EINTR), (-1, errno.EINTR), (5, 0)])
    monkeypatch.setattr(pipe, "attempt", lambda *_: next(answers))
    assert pipe.call(kvm.KVM_CREATE_VM) == 5
