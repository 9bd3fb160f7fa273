"""The options of ``run`` that give a guest its virtio devices."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pyvmm.cli.common import parse_count, parse_size
from pyvmm.cli.suboptions import parse

if TYPE_CHECKING:
    from pyvmm.machine.devices import DeviceSpec


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Define them. Each has a ``dest`` of its own: the configuration file's keys are told apart by it."""
    group = parser.add_argument_group("devices")
    group.add_argument(
        "-d", "--disk", action="append", default=[], metavar="PATH[,ro][,queues=N][,serial=TEXT]", type=parse_disk,
        help="a disk, from a raw image or a block device; may be repeated: the guest's vda, vdb and so on",
    )  # fmt: skip
    group.add_argument(
        "--rng", action=argparse.BooleanOptionalAction, default=False,
        help="an entropy device that gives the guest the host's random numbers (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--swiotlb", metavar="MiB", type=parse_size,
        help="how much a guest with private memory shares, to copy through it all that its devices read and write; "
        "0 for none (default: 16, a quarter of memory at most, where memory is private and there are devices)",
    )  # fmt: skip


def parse_disk(text: str) -> dict[str, Any]:
    """Return what ``PATH[,ro][,queues=N][,serial=TEXT]`` says, by key."""
    values = parse(text, {"path": str, "ro": None, "queues": parse_count, "serial": str}, main="path")
    if "path" not in values:
        raise argparse.ArgumentTypeError(f"{text!r} names no file; disk.img,ro does")
    return values


def device_specs(args: argparse.Namespace) -> tuple[DeviceSpec, ...]:
    """Return what the options ask for; devices of a kind in the order they were given."""
    from pyvmm.machine import devices

    specs: list[DeviceSpec] = [
        devices.Disk(disk["path"], disk.get("ro", False), disk.get("queues", 1), disk.get("serial", ""))
        for disk in args.disk
    ]
    if args.rng:
        specs.append(devices.Rng())
    return tuple(specs)
