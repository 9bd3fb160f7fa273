# SPDX-License-Identifier: Apache-2.0
"""Packages as pip installs them: modules, and a dist-info directory with entry points."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

X86 = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00" + b"\x3e\x00"
ARM64 = X86[:18] + b"\xb7\x00"
"""The first bytes of shared objects for two machines."""


@contextlib.contextmanager
def forgetting(directory: Path) -> Iterator[None]:
    """On exit, forget modules imported from ``directory``: another test's module may have the same name."""
    before = set(sys.modules)
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(directory)):
                del sys.modules[name]


def install(
    site: Path,
    package: str,
    modules: Mapping[str, str],
    entry_points: Mapping[str, Mapping[str, str]],
    binaries: Mapping[str, bytes] = MappingProxyType({}),
    *,
    requires: Sequence[str] = (),
) -> Path:
    """Install ``package`` into the directory ``site``; returns the directory of its metadata.

    ``modules`` and ``binaries`` are files by path, ``entry_points`` targets by group and name, ``requires`` packages
    that the package depends on.
    """
    contents = {name: source.encode() for name, source in modules.items()} | dict(binaries)
    for name, content in contents.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    files = [*contents]
    text = "".join(
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in targets.items())
        for group, targets in entry_points.items()
    )
    info = site / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    needs = "".join(f"Requires-Dist: {each}\n" for each in requires)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n{needs}")
    (info / "entry_points.txt").write_text(text)
    files += [f"{info.name}/{name}" for name in ("METADATA", "entry_points.txt", "RECORD")]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    return info
