# SPDX-License-Identifier: Apache-2.0
"""One option, declared as data: the command line's parser, --help, and files of options are made from it.

Whoever has something to be chosen declares it beside the code that it is about, a device kind for example::

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
What an option's text turns out to mean is in the namespace of argparse under :attr:`Option.dest`.

An option whose value makes no sense raises :class:`~pyvmm.errors.OptionError`, which names the options that it is
about: whoever read them from a file then knows which lines to blame.

This module is imported on the way to every guest. Its classes are plain ones, which cost least to make.
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
"""It may be repeated, with a value each time; its value is a list."""
FLAG: Final = "flag"
"""It takes no value: True where it is given, or its ``const`` if it has one."""
SWITCH: Final = "switch"
"""It takes no value, and ``--no-NAME`` is its opposite."""

MACHINE: Final = "machine"
"""The option says what the machine is. A snapshot holds it."""
RUN: Final = "run"
"""It is about this side of a run. Whoever restores a snapshot says it anew."""
INVOCATION: Final = "invocation"
"""It is about one invocation. No file may give it."""


class Option:
    """An option of a verb.

    ``names`` are as they are typed, ``"-m", "--mem"``; one without dashes is a word that may be left out. ``takes`` is
    one of the four words above. ``type`` makes the value of a text, and raises argparse.ArgumentTypeError. ``dest`` is
    the value's name in the namespace, made of the first long name unless given. ``says`` names what the option tells,
    its ``dest`` unless given: what the command line says, a file has no say in, and a file says it once. With ``alone``
    the command line may not say it twice either. ``group`` is the heading in --help.

    ``about`` is :data:`MACHINE`, :data:`RUN` or :data:`INVOCATION`. ``path`` is for options of a machine that name a
    file: it gets the option's text and a directory, and returns the text with the path made absolute in that.
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
    ) -> None:
        self.names = names
        self.help, self.group, self.metavar = help, group, metavar
        self.takes, self.const = takes, const
        self.type, self.choices = type, choices
        # Options of one dest may differ in this; the first one's counts.
        no_value: Any = [] if takes == SEVERAL else False if takes in (FLAG, SWITCH) and const is None else None
        self.default = no_value if default is None else default
        self.about, self.path = about, path
        self.alone = alone
        keys = [name[2:] for name in names if name.startswith("--")]
        self.keys = (*keys, *(f"no-{key}" for key in keys if takes == SWITCH))
        """The long names without their dashes, which are keys in a file; of a switch the opposites too, behind."""
        self.dest = dest or (self.keys or names)[0].replace("-", "_")
        self.says = says or self.dest

    @property
    def key(self) -> str:
        """The name that a file gives it."""
        return self.keys[0]

    @property
    def positional(self) -> bool:
        """Whether it is a word without a name."""
        return not self.names[0].startswith("-")


@contextlib.contextmanager
def about_option(name: str) -> Iterator[None]:
    """Let a UsageError that is raised within be about the option ``name``, or about those that it names itself."""
    try:
        yield
    except OptionError:
        raise
    except UsageError as error:
        raise OptionError(error.message, name, hint=error.hint) from None


@contextlib.contextmanager
def about_element(key: str, number: int) -> Iterator[None]:
    """Let a UsageError that is raised within be about the element of this number of the repeated option ``key``."""
    try:
        with about_option(key):
            yield
    except OptionError as error:
        error.options = tuple(
            f"{key}[{number}]{name.removeprefix(key)}" if name.partition(".")[0] == key else name
            for name in error.options
        )
        raise
