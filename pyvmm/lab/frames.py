# SPDX-License-Identifier: Apache-2.0
"""The frames between the workstation and the lab's agent, without I/O.

One virtio-serial port carries everything, in order, in both directions: a header (kind, length), then the payload.
The workstation sends input only up to a window, so that a signal reaches a command that never reads. The lab's image
has a copy of this module beside the agent, so its imports are cheap.
"""

from __future__ import annotations

from struct import Struct

PORT_NAME = "pyvmm.agent"
HEADER = Struct("<BI")
MAX_PAYLOAD = 1024 * 1024  # enough for a command with its environment; streams come in far smaller pieces
WINDOW = 256 * 1024

# From the workstation.
MOUNT = 1  # tag, target, options -> DONE
BIND = 2  # source, target -> DONE
EXEC = 3  # flags, rows, columns, number of arguments, cwd, arguments..., environment...
INPUT = 4  # bytes for the command's stdin; an empty payload ends it
SIGNAL = 5  # one byte: its number
RESIZE = 6  # rows, columns
HANGUP = 7  # one byte: 1 stdout, 2 stderr: the workstation no longer reads it
PREPARE = 8  # import modules for a warm interpreter, before the lab is saved -> DONE
RENEW = 9  # 8 bytes of time, nanoseconds since the epoch, little-endian; then random bytes -> DONE
BYTECODE = 10  # modules for the warm interpreter: see bytecode -> DONE

# From the agent.
READY = 32  # once, after boot
DONE = 33  # empty, or why the request failed
OUTPUT = 34
ERRORS = 35
CREDIT = 36  # how many bytes of input the command took, 4 bytes little-endian
EXIT = 37  # one byte: exit status, 128 + signal, 126 not executable, 127 not found

# Flags of EXEC, letters of its first field.
TTY = b"t"  # the command gets a terminal
MODULE = b"m"  # argv[0] is a Python module to run; a prepared agent's own interpreter runs it in a fork


def pack(kind: int, payload: bytes = b"") -> bytes:
    """Return one frame. Raises ValueError if ``payload`` is longer than MAX_PAYLOAD bytes."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a frame of {len(payload)} bytes is longer than {MAX_PAYLOAD}")
    return HEADER.pack(kind, len(payload)) + payload


def pack_fields(kind: int, *fields: bytes) -> bytes:
    """Return a frame of fields. Raises ValueError if a field contains a zero byte."""
    if any(b"\0" in field for field in fields):
        raise ValueError("embedded zero byte")
    return pack(kind, b"\0".join(fields))


class Unpacker:
    """Takes bytes as they arrive, and returns whole frames."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Add ``data``. Return the frames that are now complete. Raises ValueError if a frame claims too many bytes."""
        pending = self._pending
        pending += data
        frames = []
        at = 0
        while len(pending) - at >= HEADER.size:
            kind, length = HEADER.unpack_from(pending, at)
            if length > MAX_PAYLOAD:
                raise ValueError(f"a frame claims {length} bytes")
            end = at + HEADER.size + length
            if len(pending) < end:
                break
            frames.append((kind, bytes(pending[at + HEADER.size : end])))
            at = end
        del pending[:at]
        return frames
