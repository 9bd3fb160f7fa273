# SPDX-License-Identifier: Apache-2.0
"""pyvmm: a userspace VMM for arm64 KVM and pKVM, with the exit loop in C and everything else in Python."""

from __future__ import annotations

__version__ = "0.1.0"
