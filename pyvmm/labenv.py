# SPDX-License-Identifier: Apache-2.0
"""How programs learn that they run in a lab, what its time is, and where the trees are that it was given.

A lab says so by variables of the environment and by a parameter of its kernel. A tree is a directory that the
workstation made (``pyvmm.lab.trees``). Where a guest is started this module is read, so it imports next to nothing.
Owns nothing.
"""

from __future__ import annotations

import os

IN_LAB = "PYVMM_IN_LAB"
"""``1`` for every program in a lab."""
TREES = "PYVMM_PEERS"
"""NAME=DIRECTORY of each tree, separated by colons. Set it on arm64 hardware too, to use trees there."""
EMULATOR = "PYVMM_EMULATOR"
"""The lab's emulator and its version."""
FRESH = "PYVMM_NATIVE_IS_FRESH"
"""``1`` where the workstation has found that the lab's native loop is newer than its sources."""
COUNTS = "pyvmm.counts"
"""A parameter of the lab's kernel: what its time counts, where that is not time."""
TCG_NOTE = "QEMU TCG: times are relative only"
"""Stands beside every time that was taken in a lab: compare such times only with each other."""
MANIFEST = "manifest.json"
"""The file that every tree has."""


def in_lab() -> bool:
    """Tell whether this process runs in a lab."""
    return os.environ.get(IN_LAB) == "1"


def given_tree(name: str) -> str | None:
    """Return the directory of a tree; None if the environment does not name it or the directory is gone."""
    for entry in os.environ.get(TREES, "").split(os.pathsep):
        called, equals, path = entry.partition("=")
        if equals and called == name and os.path.isfile(os.path.join(path, MANIFEST)):
            return path
    return None
