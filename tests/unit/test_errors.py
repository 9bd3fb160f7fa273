# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import GuestMemoryError, HostError, KvmError, PyvmmError, UsageError, hex_


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0x0"),
        (0xFFF, "0xfff"),
        (0x1000, "0x1000"),
        (0x8000_0000, "0x8000_0000"),
        (0x1_0000, "0x1_0000"),
        (2**64 - 1, "0xffff_ffff_ffff_ffff"),
    ],
)
def test_addresses_are_grouped_as_in_the_documentation(value: int, text: str) -> None:
    assert hex_(value) == text


@given(st.integers(min_value=0, max_value=2**64 - 1))
def test_a_written_address_reads_back(value: int) -> None:
    assert int(hex_(value), 16) == value


def test_the_hint_has_a_separate_line() -> None:
    assert str(PyvmmError("no", hint="do")) == "no\n  hint: do"
    assert str(PyvmmError("no")) == "no"


def test_exit_statuses_distinguish_errors_of_pyvmm_the_user_and_the_host() -> None:
    assert (PyvmmError.exit_status, UsageError.exit_status, HostError.exit_status) == (1, 2, 5)
    assert KvmError("KVM_RUN", "", errno.EIO).exit_status == 1


def test_a_kvm_error_names_the_call_its_values_and_the_errno() -> None:
    error = KvmError("KVM_CREATE_VCPU", "vm=7, index=0", errno.EEXIST, "there is one", "take another")
    assert str(error) == "KVM_CREATE_VCPU(vm=7, index=0): EEXIST: there is one\n  hint: take another"
    assert (error.call, error.values, error.errno) == ("KVM_CREATE_VCPU", "vm=7, index=0", errno.EEXIST)


def test_a_kvm_error_of_unknown_cause_has_the_text_of_its_errno() -> None:
    assert str(KvmError("KVM_RUN", "vcpu0=9", errno.EPERM)) == "KVM_RUN(vcpu0=9): EPERM: Operation not permitted"


def test_a_memory_error_says_where_it_stopped_and_why() -> None:
    error = GuestMemoryError("reading 16 bytes", 0x8000_1000, 4, "private")
    assert str(error) == "reading 16 bytes: stopped at gpa 0x8000_1000 after 4 bytes: the page is private"
    assert (error.gpa, error.done, error.state) == (0x8000_1000, 4, "private")
