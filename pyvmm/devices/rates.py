# SPDX-License-Identifier: Apache-2.0
"""The suboptions ``bytes`` and ``ops`` of devices that move data: what they may move in a second."""

from __future__ import annotations

from pyvmm.errors import OptionError
from pyvmm.syntax.values import parse_count, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from pyvmm.devices.virtio.limit import Limit

LEAST_BYTES: Final = 4096
MOST: Final = 1 << 40

PARTS: Final[dict[str, Any]] = {"bytes": parse_size, "ops": parse_count}
METAVAR: Final = "[,bytes=SIZE][,ops=N]"
HELP: Final = "bytes and ops limit what it moves in a second, after a burst of one second's worth"


class Rates:
    """``bytes`` and ``ops`` (requests, or frames) a second; 0 for any number. Equal values compare equal.

    It also has the limit that holds a device to them. A guest that resets gets a new device of the same rates, and thus
    no new burst.
    """

    def __init__(self, bytes: int = 0, ops: int = 0) -> None:
        self.bytes, self.ops = bytes, ops
        self._limit: Limit | None = None

    def check(self, what: str, option: str, ops: str) -> None:
        """Raise OptionError for rates out of range; ``what`` has them, ``option`` is its name.

        ``ops`` is what it moves.
        """
        for rate, of, least, name in (
            (self.bytes, "bytes", LEAST_BYTES, f"{option}.bytes"),
            (self.ops, ops, 1, f"{option}.ops"),
        ):
            if rate and not least <= rate <= MOST:
                raise OptionError(f"{what} may move {rate} {of} a second: the limit must be {least} to {MOST}", name)

    def limit(self) -> Limit:
        """Return the limit, which is the same each time."""
        if self._limit is None:
            from pyvmm.devices.virtio.limit import Limit

            self._limit = Limit(self.bytes, self.ops)
        return self._limit

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rates) and (other.bytes, other.ops) == (self.bytes, self.ops)

    def __hash__(self) -> int:
        return hash((self.bytes, self.ops))

    def __repr__(self) -> str:
        return f"Rates(bytes={self.bytes}, ops={self.ops})"
