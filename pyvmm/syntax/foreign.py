# SPDX-License-Identifier: Apache-2.0
"""Read JSON and TOML that somebody else wrote. What would take long, or more stack than there is, is refused at once.

Both functions raise only ValueError, with the reason.
"""

from __future__ import annotations

import json
from typing import Any


def load_json(text: str | bytes) -> Any:
    """Return the value of a JSON text."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def load_toml(text: str) -> dict[str, Any]:
    """Return the table of a TOML text."""
    import tomllib

    from pyvmm.syntax.toml import check_depth

    check_depth(text)
    return tomllib.loads(text)
