# SPDX-License-Identifier: Apache-2.0
"""An entropy device, fed by the host's random number generator: ``--rng``."""

from __future__ import annotations

from pyvmm.devices.kind import DeviceKind, DeviceSpec
from pyvmm.syntax.option import SWITCH, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.kind import Context
    from pyvmm.devices.virtio.rng import VirtioRng


class Rng(DeviceSpec):
    """An entropy device, fed by the host's random number generator."""

    def make(self, context: Context) -> VirtioRng:
        """Make the device, and warn that a protected guest cannot rely on it."""
        from pyvmm.devices.virtio.rng import VirtioRng
        from pyvmm.log import get_logger

        if context.private:
            get_logger("virtio").warning(
                "entropy_from_the_host",
                protection=context.protection.value,
                meaning="a guest that does not trust the host must not rely on this device for random numbers",
            )
        return VirtioRng()


KIND = DeviceKind(
    Option(
        "--rng",
        group="devices",
        takes=SWITCH,
        help="an entropy device that gives the guest the host's random numbers (default: none)",
    ),
    lambda value, _around: Rng() if value else None,
)
