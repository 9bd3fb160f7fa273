# SPDX-License-Identifier: Apache-2.0
"""The kinds of devices that pyvmm has itself: a module each, which has a ``KIND``, and its name here."""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from pyvmm.devices.kind import DeviceKind

NAMES: Final = (
    "disk",
    "net",
    "console",
    "vsock",
    "balloon",
    "rng",
)
"""In the order in which --help lists them, and in which a guest has them."""

KINDS: Final[tuple[DeviceKind, ...]] = tuple(import_module(f"{__name__}.{name}").KIND for name in NAMES)
