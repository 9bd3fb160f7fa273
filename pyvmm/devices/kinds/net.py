# SPDX-License-Identifier: Apache-2.0
"""A network card: ``--net``."""

from __future__ import annotations

import argparse
import contextlib
import os
import re

from pyvmm.devices import rates
from pyvmm.devices.kind import Around, DeviceKind, DeviceSpec
from pyvmm.errors import OptionError
from pyvmm.syntax.option import SEVERAL, Option, about_option
from pyvmm.syntax.parts import Parts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ipaddress import IPv4Interface
    from typing import Any

    from pyvmm.devices.kind import Context
    from pyvmm.devices.virtio.net import VirtioNet
    from pyvmm.devices.virtio.netbackend import NetBackend


class Net(DeviceSpec):
    """A network card. Exactly one of ``tap``, ``passt`` and ``socket`` is not empty: its backend.

    ``tap`` is a tap's name, ``passt`` the program to start, ``socket`` the socket path of a running passt. ``address``
    is the address of the host's end of a tap, ``10.0.0.1/24``. ``forwards`` are TCP ports that passt forwards to the
    guest, as (host, guest). With ``loopback`` passt lets the guest reach services on the host's 127.0.0.1. ``mac`` is
    the card's; if it is empty, it is made from the host's and the tap's name. ``bytes`` and ``ops`` are the bytes and
    frames that it may move in a second each way, 0 for any number: see :mod:`pyvmm.devices.virtio.limit`.
    All devices that are made of one specification share them.
    """

    def __init__(
        self,
        tap: str = "",
        passt: str = "",
        socket: str = "",
        mac: str = "",
        address: str = "",
        forwards: tuple[tuple[int, int], ...] = (),
        loopback: bool = False,
        bytes: int = 0,
        ops: int = 0,
    ) -> None:
        """Raise UsageError for contradicting values."""
        self.tap, self.passt, self.socket, self.mac = tap, passt, socket, mac
        self.address, self.forwards, self.loopback = address, forwards, loopback
        self.sends, self.receives = rates.Rates(bytes, ops), rates.Rates(bytes, ops)
        self.sends.check("a network card", "net", "frames")
        given = [kind for kind in ("tap", "passt", "socket") if getattr(self, kind)]
        if len(given) != 1:
            what = f"{' and '.join(given)} at once" if given else "nothing"
            raise OptionError(
                f"a network card connected to {what}", "net", hint="--net tap=NAME, --net passt or --net socket=PATH"
            )
        if address and not tap:
            raise OptionError(
                f"an address of the host's end ({address}) with {given[0]}: only a tap has one", "net.host"
            )
        for key, what, asked in (
            ("fwd", "ports to forward", forwards),
            ("loopback", "the host's loopback", loopback),
        ):
            if asked and not passt:
                raise OptionError(f"{what} with {given[0]}: only passt, started by pyvmm, supports that", f"net.{key}")
        for port in (port for pair in forwards for port in pair):
            if not 1 <= port <= 65535:
                raise OptionError(f"port {port}: ports are 1 to 65535", "net.fwd")
        if tap:
            from pyvmm.devices.virtio.tap import check_name

            with about_option("net.tap"):
                check_name(tap)
        if mac:
            parse_mac(mac)
        self.interface()

    def interface(self) -> IPv4Interface | None:
        """Return the address of the host's end of a tap. Raises UsageError if it is invalid."""
        if not self.address:
            return None
        from ipaddress import IPv4Interface

        with contextlib.suppress(ValueError):
            if "/" in self.address:
                return IPv4Interface(self.address)
        raise OptionError(f"{self.address!r} is not an IPv4 address with a prefix, like 10.0.0.1/24", "net.host")

    def make(self, context: Context) -> VirtioNet:
        """Make the card, and its backend unless this is only a plan."""
        from pyvmm.devices.virtio.net import VirtioNet

        mac = parse_mac(self.mac) if self.mac else None
        backend = _planned() if context.planned else self._backend()
        return VirtioNet(backend, mac, sends=self.sends.limit(), receives=self.receives.limit())

    def _backend(self) -> NetBackend:
        if self.tap:
            from pyvmm.devices.virtio.tap import Tap

            return Tap(self.tap, self.interface())
        if self.passt:
            from pyvmm.devices.virtio.passt import Passt

            return Passt(self.passt, self.forwards, loopback=self.loopback)
        from pyvmm.devices.virtio.netbackend import Stream

        return Stream.connect(self.socket)


def _planned() -> NetBackend:
    from pyvmm.devices.virtio.netbackend import Stream

    return Stream("planned", os.eventfd(0, os.EFD_CLOEXEC))


def parse_mac(text: str) -> bytes:
    """Return a card's address. Raises UsageError if ``text`` is invalid."""
    if not re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", text):
        raise OptionError(f"{text!r} is not a MAC address", "net.mac", hint="use six bytes, like 02:00:00:12:34:56")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & 1 or not any(mac):
        what = "of nobody" if not any(mac) else "of a group"
        raise OptionError(
            f"{text} is an address {what}",
            "net.mac",
            hint="use 02 as the first byte (locally administered)",
        )
    return mac


def parse_forwards(text: str) -> tuple[tuple[int, int], ...]:
    """Return the pairs of ``HOST:GUEST+HOST:GUEST``."""
    pairs = []
    for part in text.split("+"):
        host, colon, guest = part.partition(":")
        if not (colon and host.isdecimal() and guest.isdecimal()):
            raise argparse.ArgumentTypeError(f"{part!r} is not a pair of TCP ports, like 8080:80")
        pairs.append((int(host), int(guest)))
    return tuple(pairs)


def _check(text: str, values: dict[str, Any]) -> dict[str, Any]:
    if sum(kind in values for kind in ("tap", "passt", "socket")) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} needs exactly one of tap=NAME, passt and socket=PATH")
    return values


def _spec(parts: dict[str, Any], around: Around) -> Net:
    return Net(
        tap=parts.get("tap", ""),
        passt=around.find_program("passt") if parts.get("passt") else "",
        socket=parts.get("socket", ""),
        mac=parts.get("mac", ""),
        address=parts.get("host", ""),
        forwards=parts.get("fwd", ()),
        loopback=parts.get("loopback", False),
        bytes=parts.get("bytes", 0),
        ops=parts.get("ops", 0),
    )


def _reaches(text: str) -> str:
    parts = PARTS(text)
    if parts.get("passt"):
        ports = "".join(f", and its TCP port {host}" for host, _ in parts.get("fwd", ()))
        return f"the host's network by passt{', also its 127.0.0.1' if parts.get('loopback') else ''}{ports}"
    return f"the tap {parts['tap']!r}" if "tap" in parts else f"the socket {parts['socket']!r}"


def _longest() -> int:
    from pyvmm.devices.virtio.vsock_host import LONGEST_ADDRESS

    return LONGEST_ADDRESS


PARTS = Parts(
    {
        "tap": str,
        "passt": None,
        "socket": str,
        "mac": str,
        "host": str,
        "fwd": parse_forwards,
        "loopback": None,
        **rates.PARTS,
    },
    check=_check,
)
KIND = DeviceKind(
    Option(
        "--net",
        group="devices",
        takes=SEVERAL,
        metavar="tap=NAME[,host=ADDR/LEN]|passt[,fwd=HOST:GUEST+...][,loopback]|socket=PATH",
        type=PARTS,
        path=PARTS.absolute("socket", longest=_longest),
        reaches=_reaches,
        help="a network card, connected to a tap, which is made if it is missing; or to passt, which is started "
        "without privileges; or to a passt that runs. Forwarded TCP ports are opened on all of the host's "
        "addresses; loopback lets the guest reach the host's 127.0.0.1 at its gateway's address. Each accepts mac=MAC, "
        f"bytes=SIZE and ops=N. {rates.HELP}, each way. May be repeated",
    ),
    _spec,
)
