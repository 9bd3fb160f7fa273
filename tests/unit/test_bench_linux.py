# SPDX-License-Identifier: Apache-2.0
"""A Linux guest is timed with pyvmm itself, installed as a user installs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.bench import linux


def test_install_leaves_out_files_that_a_lab_lists_and_cannot_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "pyvmm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "gone").symlink_to("nowhere")  # listed, but there are no files
    (package / "half.pyc.140").write_text("")
    monkeypatch.setattr(linux, "_package", str(package / "__init__.py"))
    linux.install(str(tmp_path / "to"))
    found = {path.name for path in (tmp_path / "to/site/pyvmm").iterdir()}
    assert found - {"__pycache__"} == {"__init__.py"}
