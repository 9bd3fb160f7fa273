# SPDX-License-Identifier: Apache-2.0
"""``python -m pyvmm``: the command line without the installed script."""

from __future__ import annotations

import sys

from pyvmm.cli import main

if __name__ == "__main__":
    sys.exit(main())
