# SPDX-License-Identifier: Apache-2.0
"""The options that give a guest its devices: those of :data:`pyvmm.devices.kinds.KINDS`, and what becomes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyvmm.devices.kind import Around
from pyvmm.devices.kinds import KINDS
from pyvmm.options.consoles import NOWHERE, terminal_size
from pyvmm.syntax.option import SEVERAL, Option, about_element, about_option
from pyvmm.syntax.values import parse_size

if TYPE_CHECKING:
    import argparse

    from pyvmm.devices.kind import DeviceSpec
    from pyvmm.options.consoles import Ends

DEVICE_OPTIONS: Final = (
    *(kind.option for kind in KINDS),
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
    around = Around(*console, terminal_size(console[0]), find_program)
    specs = []
    for kind in KINDS:
        option, value = kind.option, getattr(args, kind.option.dest)
        if option.takes == SEVERAL:
            for number, each in enumerate(value):
                with about_element(option.key, number):
                    specs.append(kind.spec(each, around))
        elif value is not None:
            with about_option(option.key):
                specs.append(kind.spec(value, around))
    return tuple(spec for spec in specs if spec is not None)


def find_program(name: str) -> str:
    """Return the path of a program to start: the one in PATH, or in the lab the one that it was given."""
    import shutil

    from pyvmm.lab.programs import BIN
    from pyvmm.lab.trees import find_tree

    tree = None if shutil.which(name) else find_tree(name)
    return str(tree / BIN / name) if tree else name
