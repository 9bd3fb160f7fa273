# SPDX-License-Identifier: Apache-2.0
"""The device tree of a lab whose guests get no interrupt controller."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.lab import hosttree
from pyvmm.machine.fdt import Node, Tree, parse


def tree_with(interrupts: bytes | None) -> bytes:
    controller = Node("intc@8000000", {"compatible": "arm,gic-v3"})
    if interrupts is not None:
        controller.properties["interrupts"] = interrupts
    return Tree(Node("", children=[controller, Node("timer", {"interrupts": b"\1\2\3\4"})])).to_bytes()


def test_the_controller_loses_its_interrupt_and_the_timer_keeps_its_own() -> None:
    controller, timer = parse(hosttree.without_vgic(tree_with(b"\5\6\7\x08")), "ours").children
    assert list(controller.properties) == ["compatible"]
    assert timer.properties["interrupts"] == b"\1\2\3\4"


def test_the_tree_has_no_padding_since_qemu_doubles_it() -> None:
    padded = bytearray(tree_with(b"\5\6\7\x08") + bytes(1 << 20))
    struct.pack_into(">I", padded, 4, len(padded))
    assert len(hosttree.without_vgic(bytes(padded))) < 1024


def test_a_tree_without_that_interrupt_is_refused() -> None:
    with pytest.raises(HostError, match="no intc@"):
        hosttree.without_vgic(tree_with(None))


def test_the_error_for_a_qemu_that_writes_no_tree_has_its_words(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\necho no such machine >&2; exit 1\n")
    program.chmod(0o755)
    with pytest.raises(HostError, match="no such machine"):
        hosttree.dump(str(program), "virt", [])
