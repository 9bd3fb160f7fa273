# SPDX-License-Identifier: Apache-2.0
"""A trap reads as a sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices.trap import Trap, fault_status

WORD = st.integers(0, (1 << 64) - 1)


def trap(esr: int, *, vector: int = 4, far: int = 0xDEAD_0000_0000, elr: int = 0x8008_1000) -> Trap:
    return Trap(vector=vector, esr=esr, far=far, elr=elr, spsr=0x3C5, sp=0x8009_0000, lr=0x8008_2000, vcpu=2)


@pytest.mark.parametrize(
    ("esr", "words"),
    [
        (0x0200_0000, "undefined instruction (unknown reason)"),
        (0x9600_0004, "data abort: load from 0xdead_0000_0000, translation fault, level 0"),
        (0x9600_0047, "data abort: store to 0xdead_0000_0000, translation fault, level 3"),
        (0x9600_004F, "data abort: store to 0xdead_0000_0000, permission fault, level 3"),
        (0x8600_0004, "instruction abort: fetch from 0xdead_0000_0000, translation fault, level 0"),
        (0x9600_0010, "data abort: load from 0xdead_0000_0000, external abort"),
        (0x9600_0410, "data abort: load from an unknown address, external abort"),
        (0x9600_0021, "data abort: load from 0xdead_0000_0000, alignment fault"),
        (0x8A00_0000, "misaligned program counter: 0xdead_0000_0000"),
        (0xF200_0001, "BRK instruction"),
        (0x5600_0000, "SVC"),
        (0xFC00_0000, "exception class 0x3f"),
    ],
)
def test_the_exception_is_named_with_its_address(esr: int, words: str) -> None:
    assert trap(esr).what() == words


def test_the_report_names_every_register() -> None:
    assert trap(0x9600_0004).describe() == (
        "data abort: load from 0xdead_0000_0000, translation fault, level 0; vCPU 2, ELR 0x8008_1000 ESR 0x9600_0004 "
        "FAR 0xdead_0000_0000 LR 0x8008_2000 SP 0x8009_0000 SPSR 0x3c5"
    )


def test_an_interrupt_is_not_decoded_as_a_fault() -> None:
    seen = trap(0x9600_0047, vector=5)
    assert seen.what() == "IRQ"
    assert (seen.is_abort, seen.is_write, seen.is_external) == (False, False, False)


def test_the_report_names_the_source_level_if_it_is_not_the_payloads() -> None:
    assert ", taken from lower EL, AArch64;" in trap(0x5600_0000, vector=8).describe()


def test_the_fault_status_includes_the_level() -> None:
    assert [fault_status(code) for code in (0b000110, 0b001101, 0b111111)] == [
        "translation fault, level 2",
        "permission fault, level 1",
        "fault status 0x3f",
    ]


@given(st.lists(WORD, min_size=8, max_size=8))
def test_any_values_a_guest_may_report_can_be_described(words: list[int]) -> None:
    text = Trap.from_words(words).describe()
    assert "\n" not in text
    assert f"vCPU {words[7]}" in text
