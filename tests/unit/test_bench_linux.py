# SPDX-License-Identifier: Apache-2.0
"""What a Linux guest is timed with: pyvmm itself, installed as a user has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.bench import linux


def test_what_a_lab_lists_and_does_not_find_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "pyvmm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "gone").symlink_to("nowhere")  # is listed, and nothing is there
    (package / "half.pyc.140").write_text("")
    monkeypatch.setattr(linux, "_package", str(package / "__init__.py"))
    linux.install(str(tmp_path / "to"))
    found = {path.name for path in (tmp_path / "to/site/pyvmm").iterdir()}
    assert found - {"__pycache__"} == {"__init__.py"}
