# SPDX-License-Identifier: Apache-2.0
"""The options of ``run`` that give a guest its virtio devices."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from pyvmm.options.consoles import NOWHERE, Ends, terminal_size
from pyvmm.syntax.option import SEVERAL, SWITCH, Option, about_element, about_option
from pyvmm.syntax.parts import Parts
from pyvmm.syntax.paths import OutputPath, output_behind, path_behind
from pyvmm.syntax.values import parse_count, parse_size

if TYPE_CHECKING:
    from pyvmm.machine.config import DeviceSpec


def _longest_address() -> int:
    from pyvmm.devices.virtio.vsock_host import LONGEST_ADDRESS

    return LONGEST_ADDRESS


def _longest_path() -> int:
    from pyvmm.devices.virtio.vsock_host import LONGEST_PATH

    return LONGEST_PATH


def _check_disk(text: str, values: dict[str, Any]) -> dict[str, Any]:
    if "path" not in values:
        raise argparse.ArgumentTypeError(f"{text!r} names no file; disk.img,ro does")
    return values if values.get("ro") else {**values, "path": OutputPath(values["path"])}


def _check_net(text: str, values: dict[str, Any]) -> dict[str, Any]:
    if sum(kind in values for kind in ("tap", "passt", "socket")) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is to have one of tap=NAME, passt and socket=PATH")
    return values


def parse_forwards(text: str) -> tuple[tuple[int, int], ...]:
    """Return the pairs of ``HOST:GUEST+HOST:GUEST``."""
    pairs = []
    for part in text.split("+"):
        host, colon, guest = part.partition(":")
        if not (colon and host.isdecimal() and guest.isdecimal()):
            raise argparse.ArgumentTypeError(f"{part!r} is not a pair of TCP ports, as 8080:80")
        pairs.append((int(host), int(guest)))
    return tuple(pairs)


def _check_vsock(text: str, values: dict[str, Any]) -> dict[str, Any]:
    if lacking := [key for key in ("uds", "cid") if key not in values]:
        raise argparse.ArgumentTypeError(f"{text!r} lacks {' and '.join(lacking)}; uds=guest.sock,cid=3 has both")
    return values


parse_disk = Parts({"path": str, "ro": None, "queues": parse_count, "serial": str}, main="path", check=_check_disk)
parse_net = Parts(
    {
        "tap": str,
        "passt": None,
        "socket": str,
        "mac": str,
        "host": str,
        "fwd": parse_forwards,
        "loopback": None,
    },
    check=_check_net,
)
parse_vsock = Parts({"uds": str, "cid": parse_count}, check=_check_vsock)

DEVICE_OPTIONS: Final = (
    Option(
        "-d",
        "--disk",
        group="devices",
        takes=SEVERAL,
        metavar="PATH[,ro][,queues=N][,serial=TEXT]",
        type=parse_disk,
        path=parse_disk.absolute("path"),
        help="a disk, from a raw image or a block device; may be repeated: the guest's vda, vdb and so on",
    ),
    Option(
        "--net",
        group="devices",
        takes=SEVERAL,
        metavar="tap=NAME[,host=ADDR/LEN]|passt[,fwd=HOST:GUEST+...][,loopback]|socket=PATH",
        type=parse_net,
        path=parse_net.absolute("socket", longest=_longest_address),
        help="a network card: before a tap, which is made if it is not there; before a passt that is started with it, "
        "and needs no privilege; or before one that runs. TCP ports that are forwarded are taken on all of the host's "
        "addresses; loopback lets the guest reach the host's 127.0.0.1 at its gateway's address. Each takes mac=MAC "
        "too. May be repeated",
    ),
    Option(
        "--console",
        group="devices",
        metavar="WHERE",
        type=output_behind("file"),
        path=path_behind("file"),
        help="a virtio console, hvc0 of a Linux guest, which uses it if told (-p console=hvc0): stdio (not --serial's "
        "then), file=PATH, or none (default)",
    ),
    Option(
        "--vsock",
        group="devices",
        metavar="uds=PATH,cid=N",
        type=parse_vsock,
        path=parse_vsock.absolute("uds", longest=_longest_path),
        help="sockets between guest and host: a program that connects to PATH and sends CONNECT PORT reaches the "
        "guest, whose cid is N (3 or more); the guest reaches port P of cid 2 where a program listens at PATH_P",
    ),
    Option(
        "--balloon",
        group="devices",
        metavar="SIZE",
        type=parse_size,
        help="a balloon that takes SIZE of the guest's memory, and what the guest says is free; pyvmm ctl balloon SIZE "
        "changes it (protection none only)",
    ),
    Option(
        "--rng",
        group="devices",
        takes=SWITCH,
        help="an entropy device that gives the guest the host's random numbers (default: none)",
    ),
    Option(
        "--swiotlb",
        group="devices",
        metavar="MiB",
        type=parse_size,
        help="how much a guest with private memory shares, to copy through it all that its devices read and write; "
        "0 for none (default: 16, an eighth of memory at most, where memory is private and there are devices)",
    ),
)


def device_specs(args: argparse.Namespace, console: Ends = NOWHERE) -> tuple[DeviceSpec, ...]:
    """Return what the options ask for; devices of a kind in the order they were given. ``console`` is --console's."""
    asked = [args.disk, args.net, args.console not in (None, "none"), args.vsock, args.balloon is not None, args.rng]
    if not any(asked):
        return ()  # and spare most guests the import
    from pyvmm.machine import devices

    specs: list[DeviceSpec] = []
    for number, disk in enumerate(args.disk):
        with about_element("disk", number):
            specs.append(
                devices.Disk(disk["path"], disk.get("ro", False), disk.get("queues", 1), disk.get("serial", ""))
            )
    for number, net in enumerate(args.net):
        with about_element("net", number):
            specs.append(
                devices.Net(
                    net.get("tap", ""),
                    find_passt() if net.get("passt") else "",
                    net.get("socket", ""),
                    net.get("mac", ""),
                    net.get("host", ""),
                    net.get("fwd", ()),
                    net.get("loopback", False),
                )
            )
    if args.console not in (None, "none"):
        specs.append(devices.Console(*console, size=terminal_size(console[0])))
    if args.vsock is not None:
        with about_option("vsock.cid"):
            specs.append(devices.Vsock(args.vsock["uds"], args.vsock["cid"]))
    if args.balloon is not None:
        specs.append(devices.Balloon(args.balloon))
    if args.rng:
        specs.append(devices.Rng())
    return tuple(specs)


def find_passt() -> str:
    """Return the program to start: the one in PATH, or in the lab the one that it was given."""
    import shutil

    from pyvmm.lab.programs import BIN
    from pyvmm.lab.trees import find_tree

    tree = None if shutil.which("passt") else find_tree("passt")
    return str(tree / BIN / "passt") if tree else "passt"
