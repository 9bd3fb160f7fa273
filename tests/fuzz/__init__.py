# SPDX-License-Identifier: Apache-2.0
"""What hostile guests do, guided by coverage: the native loop in C (fuzzer.py), and whole devices (devices.py).

Every target has inputs in ``corpus`` that are tried first. ``TARGETS`` has for each name what runs it: called with the
name, a file of inputs, seconds, a seed, and a file for what was found, or None.
"""

from __future__ import annotations

from typing import Final

from tests.fuzz import devices, fuzzer

TARGETS: Final = dict.fromkeys(fuzzer.TARGETS, fuzzer.run) | dict.fromkeys(devices.TARGETS, devices.run)
