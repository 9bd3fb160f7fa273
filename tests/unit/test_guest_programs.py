# SPDX-License-Identifier: Apache-2.0
"""The programs that tests run in guests are built from the sources beside them."""

from __future__ import annotations

import pytest

from tests.guest import build


@pytest.mark.parametrize("name", build.names())
def test_program_is_built_from_its_source(name: str) -> None:
    program = (build.HERE / name).read_bytes()
    assert program.startswith(b"\x7fELF\x02\x01")
    assert f"source {build.source_hash(name)}".encode() in program, "python tests/guest/build.py"
