# SPDX-License-Identifier: Apache-2.0
"""One option, declared as data: the command line's parser, --help and options files are made from it.

Each option is declared beside the code that it configures, for example a device kind::

    PARTS = Parts({"path": str, "ro": None, "queues": parse_count}, main="path")
    OPTION = Option(
        "-d",
        "--disk",
        group="devices",
        takes=SEVERAL,
        metavar="PATH[,ro][,queues=N]",
        type=PARTS,
        path=PARTS.absolute("path"),
        help="a disk, from a raw image or a block device; may be repeated",
    )

:mod:`pyvmm.options.guest` collects the options of a guest in one tuple. The order in a tuple is the order in --help.
An option's parsed value is in the namespace of argparse under :attr:`Option.dest`.

An option with an invalid value raises :class:`~pyvmm.errors.OptionError`, which names the options at fault. The reader
of an options file derives the line numbers from it.

Every start of a guest imports this module. Its classes are plain, which are the cheapest to create.
"""

from __future__ import annotations

import contextlib

from pyvmm.errors import OptionError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, Final

ONE: Final = "one"
"""The option takes one value."""
SEVERAL: Final = "several"
"""It may be repeated, with a value each time. Its result is a list."""
FLAG: Final = "flag"
"""It takes no value. Its result is True, or its ``const``."""
SWITCH: Final = "switch"
"""It takes no value, and ``--no-NAME`` is the opposite."""

MACHINE: Final = "machine"
"""The option defines the machine. A snapshot holds it."""
RUN: Final = "run"
"""The option defines this run, not the machine. It must be given again with a snapshot."""
INVOCATION: Final = "invocation"
"""The option is for one invocation. A file may not give it."""


class Option:
    """An option of a verb.

    ``names`` are as typed, ``"-m", "--mem"``. A name without dashes is an optional positional word. ``takes`` is one of
    the four words above. ``type`` converts a text to the value, and raises argparse.ArgumentTypeError. ``dest`` is the
    value's name in the namespace, by default the first long name. ``help``, ``metavar``, ``choices``, ``default`` and
    ``const`` are as argparse has them. ``group`` is the heading in --help.

    ``says`` names the option's subject, by default its ``dest``. The command line overrides a file's options on the
    same subject, and a file may have only one of them. With ``alone`` the command line may have only one as well.

    ``about`` is :data:`MACHINE`, :data:`RUN` or :data:`INVOCATION`. ``path`` is for options of a machine that name a
    file. It takes the option's text and a directory, and returns the text with an absolute path. ``reaches`` is for
    options of a machine that open something of the host. It takes the text and returns that in words, or None.
    """

    def __init__(
        self,
        *names: str,
        help: str,
        group: str = "",
        takes: str = ONE,
        metavar: str | None = None,
        type: Callable[[str], Any] | None = None,
        choices: Sequence[str] | None = None,
        default: Any = None,
        const: str | None = None,
        dest: str = "",
        says: str = "",
        alone: bool = False,
        about: str = MACHINE,
        path: Callable[[str, str], str] | None = None,
        reaches: Callable[[str], str | None] | None = None,
    ) -> None:
        self.names = names
        self.help, self.group, self.metavar = help, group, metavar
        self.takes, self.const = takes, const
        self.type, self.choices = type, choices
        # Options with the same dest may differ in this. The first one's counts.
        no_value: Any = [] if takes == SEVERAL else False if takes in (FLAG, SWITCH) and const is None else None
        self.default = no_value if default is None else default
        self.about, self.path, self.reaches = about, path, reaches
        self.alone = alone
        keys = [name[2:] for name in names if name.startswith("--")]
        self.keys = (*keys, *(f"no-{key}" for key in keys if takes == SWITCH))
        """The keys in a file: the long names without dashes. A switch also has its opposites, at the end."""
        self.dest = dest or (self.keys or names)[0].replace("-", "_")
        self.says = says or self.dest

    @property
    def key(self) -> str:
        """The option's key in a file."""
        return self.keys[0]

    @property
    def positional(self) -> bool:
        """Whether it is a word without a name."""
        return not self.names[0].startswith("-")


@contextlib.contextmanager
def about_option(name: str) -> Iterator[None]:
    """Attribute a UsageError that is raised within to the option ``name``, unless it names options itself."""
    try:
        yield
    except OptionError:
        raise
    except UsageError as error:
        raise OptionError(error.message, name, hint=error.hint) from None


@contextlib.contextmanager
def about_element(key: str, number: int) -> Iterator[None]:
    """Attribute a UsageError that is raised within to element ``number`` of the repeated option ``key``."""
    try:
        with about_option(key):
            yield
    except OptionError as error:
        error.options = tuple(
            f"{key}[{number}]{name.removeprefix(key)}" if name.partition(".")[0] == key else name
            for name in error.options
        )
        raise
