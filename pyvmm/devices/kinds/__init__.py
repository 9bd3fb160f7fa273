# SPDX-License-Identifier: Apache-2.0
"""The kinds of devices that pyvmm has itself: a module each, and a line here."""

from __future__ import annotations

from typing import Final

from pyvmm.devices.kinds import balloon, console, disk, net, rng, vsock

KINDS: Final = (
    disk.KIND,
    net.KIND,
    console.KIND,
    vsock.KIND,
    balloon.KIND,
    rng.KIND,
)
"""In the order in which --help lists them, and in which a guest has them."""
