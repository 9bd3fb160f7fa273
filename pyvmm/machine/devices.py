"""The devices a machine is to have beside its own: plain values, one class for each kind, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rng:
    """An entropy device, fed by the host's random number generator."""


#: Everything that :attr:`pyvmm.machine.config.MachineConfig.devices` may hold.
DeviceSpec = Rng
