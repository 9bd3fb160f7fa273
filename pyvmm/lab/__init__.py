# SPDX-License-Identifier: Apache-2.0
"""The lab: any Linux machine with QEMU becomes a pKVM host.

``Lab`` boots one and runs commands in it; ``build_image`` makes what it boots. Used by the CLI and the tests; nothing
below imports it.
"""

from __future__ import annotations

from pyvmm.lab.image import build_image
from pyvmm.lab.lab import Completed, Lab, require_native
from pyvmm.lab.qemu import LabError, LabOptions

__all__ = ["Completed", "Lab", "LabError", "LabOptions", "build_image", "require_native"]
