# SPDX-License-Identifier: Apache-2.0
"""A balloon that takes memory of the guest for the host: ``--balloon``."""

from __future__ import annotations

from pyvmm.devices.kind import DeviceKind, DeviceSpec
from pyvmm.errors import OptionError
from pyvmm.protection import Protection
from pyvmm.syntax.option import Option
from pyvmm.syntax.values import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.kind import Context, Guest
    from pyvmm.devices.virtio.balloon import VirtioBalloon


class Balloon(DeviceSpec):
    """A balloon that is to hold ``size`` bytes of the guest's memory from the start, and hears of what is free."""

    def __init__(self, size: int = 0) -> None:
        self.size = size

    def check(self, guest: Guest) -> None:
        """Raise UsageError where nothing could be given back, or not so much."""
        if guest.protection is Protection.PKVM:
            raise OptionError(
                "a balloon with protection pkvm: the host's kernel pins what a protected guest touches until its end, "
                "so nothing could be given back; and Linux's driver keeps its rings where the host cannot look",
                "balloon",
                "protection",
                hint="give the guest less memory: it takes what it touches, no more",
            )
        if guest.protection is Protection.EMULATED:
            raise OptionError(
                "a balloon with protection emulated: Linux's driver keeps its rings in private memory (it turns "
                "ACCESS_PLATFORM down), where the host does not look",
                "balloon",
                "protection",
                hint="use --protection none for a balloon",
            )
        if guest.backing == "hugetlb":
            raise OptionError(
                "a balloon with the hugetlb backing: the guest gives pages of 4 KiB, and these have 2 MiB",
                "balloon",
                "backing",
                hint="use --backing thp for huge pages that can be taken apart",
            )
        if not 0 <= self.size <= guest.memory:
            raise OptionError(
                f"a balloon of {self.size:#x} bytes: the guest has {guest.memory:#x}",
                "balloon",
                "mem",
                hint="name what the guest is to give up, not what it is to keep",
            )

    def make(self, context: Context) -> VirtioBalloon:
        """Make it."""
        from pyvmm.devices.virtio.balloon import VirtioBalloon

        return VirtioBalloon(context.memory, context.ram, self.size)


KIND = DeviceKind(
    Option(
        "--balloon",
        group="devices",
        metavar="SIZE",
        type=parse_size,
        help="a balloon that takes SIZE of the guest's memory, and what the guest says is free; pyvmm ctl balloon SIZE "
        "changes it (protection none only)",
    ),
    lambda size, _around: Balloon(size),
)
