# SPDX-License-Identifier: Apache-2.0
"""What the workstation shows a lab beside its files: directories by name, told by one variable of the environment.

Read where a guest is started, so it imports next to nothing; what such a directory has is its maker's to say.
"""

from __future__ import annotations

import os

VARIABLE = "PYVMM_PEERS"
"""In the environment of who uses them: NAME=DIRECTORY, more of them behind colons."""
MANIFEST = "manifest.json"
"""Every such directory has one."""


def shown(name: str) -> str | None:
    """Return the directory that goes by this name, if the environment tells of one and it is there."""
    for entry in os.environ.get(VARIABLE, "").split(os.pathsep):
        called, equals, path = entry.partition("=")
        if equals and called == name and os.path.isfile(os.path.join(path, MANIFEST)):
            return path
    return None


def in_lab() -> bool:
    """Whether this is a lab."""
    return os.environ.get("PYVMM_IN_LAB") == "1"
