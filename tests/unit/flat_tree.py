# SPDX-License-Identifier: Apache-2.0
"""Reads flattened device trees for tests: directly, and with dtc if it is installed."""

from __future__ import annotations

import shutil
import struct
import subprocess

import pytest

DTC = shutil.which("dtc")
needs_dtc = pytest.mark.skipif(DTC is None, reason="dtc (package device-tree-compiler) is not installed")


def dtc(data: bytes, output: str, *more: str) -> subprocess.CompletedProcess[bytes]:
    assert DTC is not None
    command = [DTC, "-I", "dtb", "-O", output, *more, "-"]
    return subprocess.run(command, input=data, capture_output=True, timeout=20, check=False)


def read(data: bytes) -> tuple[list[tuple[int, int]], dict[str, dict[str, bytes]]]:
    """Parse a flattened tree in a simple, slow way: reservations and {path: {property: bytes}}."""
    magic, total, structure, strings, reserve, version, compatible, _cpu, n_strings, n_structure = struct.unpack_from(
        ">10I", data
    )
    assert (magic, total, version, compatible) == (0xD00DFEED, len(data), 17, 16)
    assert structure + n_structure <= total
    assert strings + n_strings <= total
    assert reserve % 8 == 0
    assert structure % 4 == 0
    reserved = []
    while (pair := struct.unpack_from(">QQ", data, reserve)) != (0, 0):
        reserved.append(pair)
        reserve += 16
    nodes: dict[str, dict[str, bytes]] = {}
    path: list[str] = []
    at = structure
    while True:
        (token,) = struct.unpack_from(">I", data, at)
        at += 4
        if token == 1:
            end = data.index(b"\0", at)
            path.append(data[at:end].decode())
            nodes["/".join(path) or "/"] = {}
            at = end + 4 - end % 4
        elif token == 2:
            path.pop()
        elif token == 3:
            length, name = struct.unpack_from(">II", data, at)
            name_end = data.index(b"\0", strings + name)
            nodes["/".join(path) or "/"][data[strings + name : name_end].decode()] = data[at + 8 : at + 8 + length]
            at += 8 + (length + 3) // 4 * 4
        elif token == 9:
            return reserved, nodes
        else:
            assert token == 4
