# SPDX-License-Identifier: Apache-2.0
"""Packages as pip leaves them: a module or more, and a dist-info directory with entry points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(
    site: Path, package: str, modules: Mapping[str, str], entry_points: Mapping[str, Mapping[str, str]] | str
) -> Path:
    """Install ``package`` into the directory ``site``; returns the directory of its metadata.

    ``modules`` are files by their paths, ``entry_points`` targets by name by group, or the text of their file.
    """
    files = []
    for name, source in modules.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        files.append(name)
    if not isinstance(entry_points, str):
        entry_points = "".join(
            f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in targets.items())
            for group, targets in entry_points.items()
        )
    info = site / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    files += [f"{info.name}/{name}" for name in ("METADATA", "entry_points.txt", "RECORD")]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    return info
