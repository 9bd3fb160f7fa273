# SPDX-License-Identifier: Apache-2.0
"""Read the lab's environment: whether this is a lab, the unit of its time, and its directory trees.

A lab sets environment variables and a kernel parameter. A tree is a directory that the workstation made
(``pyvmm.lab.trees``). Every start of a guest imports this module, so it imports almost nothing. Owns nothing.
"""

from __future__ import annotations

import os

IN_LAB = "PYVMM_IN_LAB"
"""``1`` for all programs in a lab."""
TREES = "PYVMM_PEERS"
"""NAME=DIRECTORY of each tree, separated by colons. Can also be set on arm64 hardware."""
EMULATOR = "PYVMM_EMULATOR"
"""The lab's emulator and its version."""
FRESH = "PYVMM_NATIVE_IS_FRESH"
"""``1`` if the workstation has checked that the lab's native loop is newer than its sources."""
COUNTS = "pyvmm.counts"
"""A kernel parameter of the lab: the unit of its clock, if that is not time."""
TCG_NOTE = "QEMU TCG: times are relative only"
"""The note for all times measured in a lab: compare such times only with each other."""
MANIFEST = "manifest.json"
"""The manifest file of every tree."""


def in_lab() -> bool:
    """Tell whether this process runs in a lab."""
    return os.environ.get(IN_LAB) == "1"


def given_tree(name: str) -> str | None:
    """Return the directory of a tree, or None if the environment does not name it or it is gone."""
    for entry in os.environ.get(TREES, "").split(os.pathsep):
        called, equals, path = entry.partition("=")
        if equals and called == name and os.path.isfile(os.path.join(path, MANIFEST)):
            return path
    return None
