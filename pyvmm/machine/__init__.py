# SPDX-License-Identifier: Apache-2.0
"""Build one VM: the address map, the boot protocol, the device tree, and the wiring of everything else."""

from pyvmm.machine.config import MachineConfig
from pyvmm.machine.machine import Machine

__all__ = ["Machine", "MachineConfig"]
