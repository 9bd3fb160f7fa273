# SPDX-License-Identifier: Apache-2.0
"""The suboptions ``bytes`` and ``ops`` of devices that move data: what they may move in a second."""

from __future__ import annotations

from pyvmm.errors import OptionError
from pyvmm.syntax.values import parse_count, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

LEAST_BYTES: Final = 4096
MOST: Final = 1 << 40

PARTS: Final[dict[str, Any]] = {"bytes": parse_size, "ops": parse_count}
METAVAR: Final = "[,bytes=SIZE][,ops=N]"
HELP: Final = "bytes and ops limit what it moves in a second, after a burst of one second's worth"


def check(what: str, option: str, bytes: int, ops: int) -> None:
    """Raise OptionError for rates that are not 0 and out of range; ``what`` has them, ``option`` is its name."""
    if bytes and not LEAST_BYTES <= bytes <= MOST:
        raise OptionError(
            f"{what} may move {bytes} bytes a second: the limit can be {LEAST_BYTES} to {MOST}", f"{option}.bytes"
        )
    if ops and not 1 <= ops <= MOST:
        raise OptionError(
            f"{what} may carry out {ops} requests a second: the limit can be 1 to {MOST}", f"{option}.ops"
        )
