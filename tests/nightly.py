# SPDX-License-Identifier: Apache-2.0
"""Whether this run of the tests is a night's. Tests whose whole would take CI too long run a part of it by day."""

from __future__ import annotations

import os
from typing import Final

#: Set by .ci/nightly. The tests in the lab get it as well (see tests/labtier.py).
VARIABLE: Final = "PYVMM_NIGHTLY"
NIGHTLY: Final = VARIABLE in os.environ
