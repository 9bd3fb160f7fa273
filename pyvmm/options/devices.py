# SPDX-License-Identifier: Apache-2.0
"""The options that give a guest its devices: those of :data:`pyvmm.devices.kinds.KINDS`, and their results.

Devices of other packages share the option ``--device NAME``. A command line without it reads no entry points.
"""

from __future__ import annotations

import argparse

from pyvmm.devices.kind import Around, DeviceKind
from pyvmm.devices.kinds import KINDS
from pyvmm.syntax.option import SEVERAL, Option, about_element, about_option
from pyvmm.syntax.values import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from pyvmm.devices.kind import DeviceSpec
    from pyvmm.options.consoles import Ends

LIST: Final = "help"
"""The value that lists the available devices."""


def brought(text: str) -> tuple[DeviceKind, Any]:
    """Return the device kind of ``NAME[,KEY=VALUE...]``, and the parsed parts after the name.

    In a file's table the name is the value of the key ``name``. For the name ``list`` it prints the devices and ends
    the process. Raises PluginError if the package of that device cannot be used.
    """
    name, rest = _named(text)
    if name == LIST and not rest:
        raise SystemExit(_list())
    kind = _find(name)
    if kind.option.type is None:
        if rest:
            raise argparse.ArgumentTypeError(f"{rest!r} in {text!r}: the device {name} has no such parts")
        return kind, None
    return kind, kind.option.type(rest)


def _named(text: str) -> tuple[str, str]:
    """Return the name, and the parts without it."""
    parts = text.split(",")
    place = next((number for number, part in enumerate(parts) if part.startswith("name=")), 0)
    return parts.pop(place).removeprefix("name="), ",".join(parts)


def _find(name: str) -> DeviceKind:
    from pyvmm import plugins

    if own := next((kind.option for kind in KINDS if kind.option.key == name), None):
        raise argparse.ArgumentTypeError(f"{name!r} has its own option: {own.names[-1]}")
    kind = plugins.find(plugins.DEVICES, name, DeviceKind)
    if kind is None:
        raise argparse.ArgumentTypeError(f"no installed package has a device {name!r}; --device {LIST} lists them")
    return kind


def _list() -> int:
    """Print the devices of other packages, and faults of these packages. Returns the exit status."""
    from pyvmm import plugins
    from pyvmm.terminal import clean, say

    found, faults = plugins.every(plugins.DEVICES, DeviceKind, taken={kind.option.key for kind in KINDS})
    for each in found:
        option = each.item.option
        print(clean(f"{each.name}{option.metavar or ''}  {option.help} (package {each.package})"))
    if not found and not faults:
        print('no installed package has a device; a package adds one by an entry point in "pyvmm.devices"')
    for fault in faults:
        say(fault.message)
    return faults[0].exit_status if faults else 0


def _absolute(text: str, directory: str) -> str:
    name, rest = _named(text)
    make = _find(name).option.path
    return text if make is None or not rest else f"{name},{make(rest, directory)}"


DEVICE_OPTIONS: Final = (
    *(kind.option for kind in KINDS),
    Option(
        "--swiotlb",
        group="devices",
        metavar="MiB",
        type=parse_size,
        help="size of the bounce buffer (swiotlb) that a guest with private memory shares with its devices; "
        "0 for none (default with private memory and devices: 16 MiB, at most an eighth of memory)",
    ),
    Option(
        "--device",
        group="devices",
        takes=SEVERAL,
        metavar="NAME[,KEY=VALUE...]",
        type=brought,
        path=_absolute,
        reaches=lambda text: f"the device {_named(text)[0]!r} of an installed package",
        help=f"a device of an installed package; {LIST} lists them; may be repeated",
    ),
)


def device_specs(args: argparse.Namespace, console: Ends = (None, None)) -> tuple[DeviceSpec, ...]:
    """Return the requested devices, those of a kind in the given order. ``console`` is --console's."""
    from pyvmm.options.consoles import terminal_size  # not needed by every command line

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
    for number, (kind, value) in enumerate(args.device):
        with about_element("device", number):
            specs.append(kind.spec(value, around))
    return tuple(spec for spec in specs if spec is not None)


def find_program(name: str) -> str:
    """Return the path of a program to start: the one in PATH, or in the lab the one that the lab was given."""
    import shutil

    from pyvmm.lab.programs import BIN
    from pyvmm.lab.trees import find_tree

    tree = None if shutil.which(name) else find_tree(name)
    return str(tree / BIN / name) if tree else name
