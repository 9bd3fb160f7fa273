# SPDX-License-Identifier: Apache-2.0
"""linux/capability.h: what root may do, in parts."""

from __future__ import annotations

CAP_IPC_LOCK = 14
_LINUX_CAPABILITY_VERSION_3 = 0x2008_0522
