# SPDX-License-Identifier: Apache-2.0
"""Check a command line against the limits of an arm64 Linux. Beyond them, Linux truncates the line or panics.

Both happen before Linux has a console. Owns nothing. The boot protocol calls it for long lines.
"""

from __future__ import annotations

from pyvmm.errors import OptionError
from pyvmm.machine.fdt import encode, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from pyvmm.machine.boot import BootImage

#: Linux arch/arm64/include/uapi/asm/setup.h, COMMAND_LINE_SIZE, which includes the final NUL.
LIMIT: Final = 2048
#: Linux init/Kconfig, INIT_ENV_ARG_LIMIT: set_init_arg() of init/main.c panics at the next one.
INIT_WORDS: Final = 32
SEPARATOR: Final = b"--"

_BANNER: Final = b"Linux version "
# Linux lib/ctype.c, isspace(): includes latin-1's no-break space.
_SPACE: Final = b" \t\n\v\f\r\xa0"


def is_linux(image: BootImage) -> bool:
    """Whether this is a Linux: every Image is one, an ELF file if it contains the banner."""
    if image.kind == "ELF":
        from pyvmm.machine.packed import whole  # an ELF file is the exception

        return any(_BANNER in whole(part.data) for part in image.segments)
    return image.kind == "Image"


def line_in(tree: bytes, what: str) -> bytes:
    """Return the command line in a device tree. Raises UsageError, naming ``what``, for a damaged tree."""
    for node in parse(tree, what).children:
        if node.name == "chosen":
            return encode(node.properties.get("bootargs", b"")).partition(b"\0")[0]
    return b""


def check(line: bytes, *options: str) -> None:
    """Raise OptionError, about ``options``, for a line that Linux would truncate or panic on."""
    if len(line) >= LIMIT:
        raise OptionError(
            f"the kernel's command line has {len(line) + 1} bytes with its NUL. An arm64 Linux accepts {LIMIT} and "
            "drops the rest",
            *options,
            hint="put long values into a file in the initramfs or on a disk, and pass its name",
        )
    if (count := len(_for_init(_words(line)))) > INIT_WORDS:
        raise OptionError(
            f"{count} words after -- on the kernel's command line: Linux accepts {INIT_WORDS} for init, and panics at "
            "more",
            *options,
            hint="join words with double quotes, or put the command into a file",
        )


def _for_init(words: list[bytes]) -> list[bytes]:
    """Return the words between the first ``--`` and the next one, where Linux stops."""
    if SEPARATOR not in words:
        return []
    behind = words[words.index(SEPARATOR) + 1 :]
    return behind[: behind.index(SEPARATOR)] if SEPARATOR in behind else behind


def _words(line: bytes) -> list[bytes]:
    """Split the line as next_arg() of Linux lib/cmdline.c does: at spaces outside of double quotes."""
    words: list[bytes] = []
    word = bytearray()
    quoted = False
    for byte in line + b" ":
        quoted ^= byte == ord('"')
        if byte in _SPACE and not quoted:
            if word:
                words.append(bytes(word))
            word.clear()
        else:
            word.append(byte)
    if word:  # an unterminated quote
        words.append(bytes(word))
    # A quote at a word's start is removed, together with one at its end.
    return [word[1:].removesuffix(b'"') if word.startswith(b'"') else word for word in words]
