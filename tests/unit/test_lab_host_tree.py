# SPDX-License-Identifier: Apache-2.0
"""The device tree of a lab whose guests get no interrupt controller."""

from __future__ import annotations

import struct
import tempfile
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


def test_a_directory_for_temporary_files_may_have_a_comma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, directory = tmp_path / "qemu", tmp_path / "a,b"
    program.write_text('#!/bin/sh\nprintf tree > "${2##*dumpdtb=}"\n')
    program.chmod(0o755)
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    assert hosttree.dump(str(program), "virt", []) == b"tree"
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("how", ["absent", "asleep"])
def test_a_qemu_that_does_not_run_or_does_not_end_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    program = tmp_path / "qemu"
    if how == "asleep":
        program.write_text("#!/bin/sh\nexec sleep 600\n")
        program.chmod(0o755)
        monkeypatch.setattr(hosttree, "PATIENCE", 0.2)
    with pytest.raises(HostError, match=f"no device tree of its machine: .*{program}"):
        hosttree.dump(str(program), "virt", [])
