# SPDX-License-Identifier: Apache-2.0
"""kvmtool's source: only the pinned source is accepted, and failed downloads are reported."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from pyvmm.errors import PyvmmError
from pyvmm.lab import kvmtool, peers


def test_a_lab_can_mount_kvmtool_by_name() -> None:
    peers.check([kvmtool.NAME])
    assert peers.ALL[kvmtool.NAME] is kvmtool.recipe


def test_only_the_pinned_source_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(b"kvmtool")
    monkeypatch.setattr(kvmtool, "SOURCE", path.as_uri())
    with pytest.raises(PyvmmError, match="is not what it was"):
        kvmtool._fetched()
    monkeypatch.setattr(kvmtool, "SHA256", hashlib.sha256(b"kvmtool").hexdigest())
    assert kvmtool._fetched() == b"kvmtool"


def test_the_error_for_a_failed_download_has_the_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kvmtool, "SOURCE", (tmp_path / "none").as_uri())
    with pytest.raises(PyvmmError, match="cannot be fetched") as caught:
        kvmtool._fetched()
    assert str(tmp_path / "none") in (caught.value.hint or "")


def test_headers_and_the_library_are_taken_from_libfdts_package(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in (
        "usr/include/libfdt.h",
        "usr/lib/aarch64-linux-gnu/libfdt.a",
        "usr/share/doc/README",
        "DEBIAN/control",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    fields = "Package: libfdt-dev\nVersion: 1\nArchitecture: all\nMaintainer: t\nDescription: t\n"
    (root / "DEBIAN/control").write_text(fields)
    package = tmp_path / "libfdt.deb"
    subprocess.run(["dpkg-deb", "--build", root, package], check=True, capture_output=True)
    taken = tmp_path / "taken"
    taken.mkdir()
    kvmtool._unpack(package, taken)
    assert sorted(path.name for path in taken.iterdir()) == ["libfdt.a", "libfdt.h"]
