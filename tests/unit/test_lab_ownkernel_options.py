# SPDX-License-Identifier: Apache-2.0
"""The options of the project's own kernel, in its two variants."""

from __future__ import annotations

import re

import pytest

from pyvmm.lab import ownkernel
from pyvmm.lab.ownkernel import Variant


def test_every_option_has_a_reason_and_appears_once() -> None:
    lines = [line for line in ownkernel.FRAGMENT.read_text().splitlines() if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r'CONFIG_[A-Z0-9_]+=([yn]|\d+|"[^"#]+")  # \S.+', line), line
        assert len(line) <= 120
    for variant in Variant:
        names = [line.partition("=")[0] for line in ownkernel.options(variant)]
        assert sorted(set(names)) == sorted(names)
    taken = {line for variant in Variant for line in ownkernel.options(variant)}
    assert taken == {line.partition("  #")[0] for line in lines}


@pytest.mark.parametrize(
    "option",
    [
        "KVM",
        "NVHE_EL2_DEBUG",
        "FTRACE",
        "ARM_PKVM_GUEST",
        "DMA_RESTRICTED_POOL",
        "9P_FS",
        "NET_9P_VIRTIO",
        "VIRTIO_BLK",
        "VIRTIO_CONSOLE",
        "USERFAULTFD",
        "MEMORY_FAILURE",
        "ZRAM",
        "KSM",
    ],
)
def test_the_options_include_pkvm_and_tracing(option: str) -> None:
    assert f"CONFIG_{option}=y" in ownkernel.options(Variant.HOST)


@pytest.mark.parametrize(
    "option",
    ["ARM_PKVM_GUEST", "DMA_RESTRICTED_POOL", "VIRTIO_MMIO", "VIRTIO_BLK", "VIRTIO_CONSOLE", "EXT4_FS", "FUTEX"],
)
def test_the_guests_options_include_what_a_guest_needs(option: str) -> None:
    assert f"CONFIG_{option}=y" in ownkernel.options(Variant.GUEST)


def test_the_guests_kernel_has_neither_kvm_nor_tracing() -> None:
    wanted = "\n".join(ownkernel.options(Variant.GUEST))
    assert not re.search("CONFIG_(KVM|FTRACE|ENABLE_DEFAULT_TRACERS|NVHE_EL2_DEBUG|DEBUG_FS|PCI|VIRTIO_PCI)=", wanted)
