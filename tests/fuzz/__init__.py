# SPDX-License-Identifier: Apache-2.0
"""Fuzzing with hostile guests, guided by coverage: the native loop in C (fuzzer.py), and whole devices (devices.py).

Every target first tries its inputs in ``corpus``. ``TARGETS`` maps each name to its runner, which is called with the
name, a file of inputs, seconds, a seed, and a file for new inputs, or None.
"""

from __future__ import annotations

from typing import Final

from tests.fuzz import devices, fuzzer

TARGETS: Final = dict.fromkeys(fuzzer.TARGETS, fuzzer.run) | dict.fromkeys(devices.TARGETS, devices.run)
