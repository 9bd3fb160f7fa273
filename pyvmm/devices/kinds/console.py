# SPDX-License-Identifier: Apache-2.0
"""A virtio console: ``--console``."""

from __future__ import annotations

from pyvmm.devices.kind import Around, DeviceKind, DeviceSpec
from pyvmm.syntax.option import Option
from pyvmm.syntax.paths import output_behind, path_behind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.kind import Context
    from pyvmm.devices.virtio.console import VirtioConsole


class Console(DeviceSpec):
    """A virtio console, ``hvc0`` of a Linux guest, between descriptors that somebody else closes.

    ``size`` is the columns and rows of its terminal, or None.
    """

    def __init__(self, out: int | None = None, source: int | None = None, size: tuple[int, int] | None = None) -> None:
        self.out, self.source, self.size = out, source, size

    def make(self, context: Context) -> VirtioConsole:
        """Make it."""
        from pyvmm.devices.virtio.console import VirtioConsole

        return VirtioConsole(self.out, self.source, size=self.size, unheard=context.unheard)


def _reaches(where: str) -> str | None:
    word, _, path = where.partition("=")
    return f"{path!r} to write" if word == "file" else None


def _spec(where: str, around: Around) -> Console | None:
    return None if where == "none" else Console(around.out, around.source, around.size)


KIND = DeviceKind(
    Option(
        "--console",
        group="devices",
        metavar="WHERE",
        type=output_behind("file"),
        path=path_behind("file"),
        reaches=_reaches,
        help="a virtio console, hvc0 of a Linux guest, used with -p console=hvc0: stdio (then not --serial's), "
        "file=PATH, or none (default)",
    ),
    _spec,
)
