"""The interrupt controller in the kernel, as a guest finds it."""

from __future__ import annotations

import pytest

from pyvmm.atlas.experiment import Experiment
from pyvmm.machine import layout
from pyvmm.protection import Protection

pytestmark = pytest.mark.pkvm

PIDR2 = 0xFFE8
"""Arm IHI 0069, 12.9.38: bits 7 to 4 are the architecture's revision."""
GICR_TYPER = 0x8
LAST = 1 << 4


@pytest.mark.parametrize("protection", Protection)
def test_every_machine_has_a_gicv3_with_a_redistributor_for_each_vcpu(protection: Protection) -> None:
    with Experiment(protection, cpus=2) as x:
        assert x.guest.read32(layout.GIC_DISTRIBUTOR.start + PIDR2) >> 4 & 0xF == 3
        types = [x.guest.read64(layout.GIC_REDISTRIBUTORS.start + n * 0x2_0000 + GICR_TYPER) for n in range(2)]
    assert [type_ >> 8 & 0xFFFF for type_ in types] == [0, 1]
    assert [bool(type_ & LAST) for type_ in types] == [False, True]
