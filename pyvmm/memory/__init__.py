# SPDX-License-Identifier: Apache-2.0
"""Guest memory: backings, memory slots, the page ledger, guarded access, conversions, the share relay."""

from __future__ import annotations
