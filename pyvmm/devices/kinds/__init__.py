# SPDX-License-Identifier: Apache-2.0
"""pyvmm's own kinds of devices: one module each, with a ``KIND``, listed here by name."""

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
    "vmgenid",
)
"""In the order of --help, and of the guest's devices."""

KINDS: Final[tuple[DeviceKind, ...]] = tuple(import_module(f"{__name__}.{name}").KIND for name in NAMES)
