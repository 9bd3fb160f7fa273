# SPDX-License-Identifier: Apache-2.0
"""Sockets between guest and host: ``--vsock``."""

from __future__ import annotations

import argparse

from pyvmm.devices.kind import DeviceKind, DeviceSpec
from pyvmm.syntax.option import Option, about_option
from pyvmm.syntax.parts import Parts
from pyvmm.syntax.values import parse_count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.devices.kind import Context
    from pyvmm.devices.virtio.vsock import VirtioVsock


class Vsock(DeviceSpec):
    """The guest's stream sockets at ``cid``, and the host's at the Unix socket ``path`` and ``path_PORT``."""

    def __init__(self, path: str, cid: int) -> None:
        """Raise UsageError for an invalid cid."""
        from pyvmm.devices.virtio.vsock_packet import check_cid

        with about_option("vsock.cid"):
            check_cid(cid)
        self.path, self.cid = path, cid

    def make(self, context: Context) -> VirtioVsock:
        """Make the device, which listens from now on."""
        from pyvmm.devices.virtio.vsock import VirtioVsock

        return VirtioVsock(self.path, self.cid, listen=not context.planned)


def _check(text: str, values: dict[str, Any]) -> dict[str, Any]:
    if lacking := [key for key in ("uds", "cid") if key not in values]:
        raise argparse.ArgumentTypeError(f"{text!r} lacks {' and '.join(lacking)}; uds=guest.sock,cid=3 has both")
    return values


def _reaches(text: str) -> str:
    path = PARTS(text)["uds"]
    return f"the socket {path!r} and those whose names begin like {path + '_'!r}"


def _longest() -> int:
    from pyvmm.devices.virtio.vsock_host import LONGEST_PATH

    return LONGEST_PATH


PARTS = Parts({"uds": str, "cid": parse_count}, check=_check)
KIND = DeviceKind(
    Option(
        "--vsock",
        group="devices",
        metavar="uds=PATH,cid=N",
        type=PARTS,
        path=PARTS.absolute("uds", longest=_longest),
        reaches=_reaches,
        help="sockets between guest and host: a program that connects to PATH and sends CONNECT PORT reaches the "
        "guest, whose cid is N (3 or more); the guest reaches port P of cid 2 where a program listens at PATH_P",
    ),
    lambda parts, _around: Vsock(parts["uds"], parts["cid"]),
)
