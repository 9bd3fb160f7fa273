"""The options of ``run`` that give a guest its virtio devices."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.machine.devices import DeviceSpec


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Define them. Each has a ``dest`` of its own: the configuration file's keys are told apart by it."""
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--rng", action=argparse.BooleanOptionalAction, default=False,
        help="an entropy device that gives the guest the host's random numbers (default: none)",
    )  # fmt: skip


def device_specs(args: argparse.Namespace) -> tuple[DeviceSpec, ...]:
    """Return what the options ask for; devices of a kind in the order they were given."""
    from pyvmm.machine import devices

    specs: list[DeviceSpec] = []
    if args.rng:
        specs.append(devices.Rng())
    return tuple(specs)
