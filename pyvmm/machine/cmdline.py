# SPDX-License-Identifier: Apache-2.0
"""What an arm64 Linux takes of a command line: what is beyond that it cuts off, or panics of, before it has a console.

Owns nothing. The boot protocol asks where a line could be too long.
"""

from __future__ import annotations

from pyvmm.errors import OptionError
from pyvmm.machine.content import whole
from pyvmm.machine.fdt import encode, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from pyvmm.machine.boot import BootImage

#: Linux arch/arm64/include/uapi/asm/setup.h, COMMAND_LINE_SIZE, which counts the NUL behind the last byte.
LIMIT: Final = 2048
#: Linux init/Kconfig, INIT_ENV_ARG_LIMIT: set_init_arg() of init/main.c panics at the next one.
INIT_WORDS: Final = 32
SEPARATOR: Final = b"--"

_BANNER: Final = b"Linux version "
# Linux lib/ctype.c, isspace(): latin-1's hard space too.
_SPACE: Final = b" \t\n\v\f\r\xa0"


def is_linux(image: BootImage) -> bool:
    """Whether this is a Linux: an Image is one by its form, an ELF file by the banner in it."""
    if image.kind == "ELF":
        return any(_BANNER in whole(part.data) for part in image.segments)
    return image.kind == "Image"


def line_in(tree: bytes, what: str) -> bytes:
    """Return the command line that a device tree gives its guest; UsageError, naming ``what``, for a damaged one."""
    for node in parse(tree, what).children:
        if node.name == "chosen":
            return encode(node.properties.get("bootargs", b"")).partition(b"\0")[0]
    return b""


def check(line: bytes, *options: str) -> None:
    """Raise OptionError, about ``options``, for a line that Linux would cut or panic of."""
    if len(line) >= LIMIT:
        raise OptionError(
            f"the kernel's command line has {len(line) + 1} bytes with its NUL: an arm64 Linux takes {LIMIT}, and runs "
            "what is left of it",
            *options,
            hint="put what is long into a file of the initramfs or of a disk, and name that",
        )
    if (count := len(_for_init(_words(line)))) > INIT_WORDS:
        raise OptionError(
            f"{count} words behind -- on the kernel's command line: Linux gives its init {INIT_WORDS}, and panics of "
            "more",
            *options,
            hint="a pair of double quotes makes one word of several; or put the command into a file",
        )


def _for_init(words: list[bytes]) -> list[bytes]:
    """Return the words between the first ``--`` and the next one, where Linux stops again."""
    if SEPARATOR not in words:
        return []
    behind = words[words.index(SEPARATOR) + 1 :]
    return behind[: behind.index(SEPARATOR)] if SEPARATOR in behind else behind


def _words(line: bytes) -> list[bytes]:
    """Take the line apart as next_arg() of Linux lib/cmdline.c does: at spaces, but not between double quotes."""
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
    if word:  # a quote that does not end
        words.append(bytes(word))
    # A quote at a word's start is taken off, and with it the one at its end.
    return [word[1:].removesuffix(b'"') if word.startswith(b'"') else word for word in words]
