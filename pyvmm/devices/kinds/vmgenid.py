# SPDX-License-Identifier: Apache-2.0
"""A generation id, by which a restored guest draws new random numbers: ``--vmgenid``."""

from __future__ import annotations

from pyvmm.devices.kind import DeviceKind, DeviceSpec
from pyvmm.errors import OptionError
from pyvmm.protection import Protection
from pyvmm.syntax.option import SWITCH, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.kind import Context, Guest
    from pyvmm.devices.vmgenid import VmGenId


class GenerationId(DeviceSpec):
    """A generation id, new in each guest that is restored from a snapshot."""

    virtio = False

    def check(self, guest: Guest) -> None:
        """Raise UsageError for a guest that cannot be saved."""
        if guest.protection is not Protection.NONE:
            raise OptionError(
                f"a generation id with protection {guest.protection.value}: it is for restored guests, and a guest "
                "with private memory cannot be saved",
                "vmgenid",
                "protection",
                hint="drop --vmgenid",
            )

    def make(self, context: Context) -> VmGenId:
        """Make it."""
        from pyvmm.devices.vmgenid import VmGenId

        return VmGenId(context.memory)


KIND = DeviceKind(
    Option(
        "--vmgenid",
        group="devices",
        takes=SWITCH,
        help="a generation id: a guest that is restored from a snapshot gets a new one, and Linux draws new random "
        "numbers (protection none only; default: none)",
    ),
    lambda value, _around: GenerationId() if value else None,
)
