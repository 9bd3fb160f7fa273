# SPDX-License-Identifier: Apache-2.0
"""Make the parser of a command line from a table of options.

Each verb that runs a guest has a :class:`Table`, of :class:`~pyvmm.syntax.option.Option` in the order of --help.
"""

from __future__ import annotations

import argparse

from pyvmm.syntax.option import FLAG, SEVERAL, SWITCH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, Protocol

    from pyvmm.syntax.option import Option

    class Place(Protocol):
        """An argparse parser, or a group in one."""

        def add_argument(self, *names: str, **how: Any) -> object:
            """Define an option."""
            ...

        def add_mutually_exclusive_group(self) -> Place:
            """Make a group of options that exclude each other."""
            ...


class Table:
    """The options of a verb: its own ``options``, and those that ``common`` adds to every verb.

    Iterating yields the verb's own options.
    """

    def __init__(self, options: Sequence[Option], common: Callable[[argparse.ArgumentParser], None]) -> None:
        self.options = tuple(options)
        self._common = common

    def __iter__(self) -> Iterator[Option]:
        return iter(self.options)

    def add_to(self, parser: argparse.ArgumentParser, *, as_text: bool = False) -> None:
        """Define the options. With ``as_text`` values stay text, and options have no defaults."""
        groups: dict[str, Place] = {}
        rivals: dict[str, Place] = {}
        for option in self.options:
            # Not the parser itself: that makes a formatter of help for each option.
            place: Place = parser._positionals if option.positional else parser._optionals
            if option.group:
                if option.group not in groups:
                    groups[option.group] = parser.add_argument_group(option.group)
                place = groups[option.group]
            if option.alone:
                if option.dest not in rivals:
                    rivals[option.dest] = place.add_mutually_exclusive_group()
                place = rivals[option.dest]
            place.add_argument(*option.names, **_arguments(option, as_text=as_text))
        self._common(parser)

    def given(self, words: Sequence[str]) -> dict[str, Any]:
        """Return the options in the words after the verb, by ``dest``, as text. The words must be valid."""
        parser = argparse.ArgumentParser(allow_abbrev=False)
        self.add_to(parser, as_text=True)
        return vars(parser.parse_args(words))


def _arguments(option: Option, *, as_text: bool) -> dict[str, Any]:
    """Return an option's arguments for argparse."""
    arguments: dict[str, Any] = {
        "help": option.help,
        "default": argparse.SUPPRESS if as_text else option.default,
    }
    if option.positional:
        arguments["nargs"] = "?"
    else:
        arguments["dest"] = option.dest
    if option.takes == FLAG:
        arguments["action"] = "store_true" if option.const is None else "store_const"
        if option.const is not None:
            arguments["const"] = option.const
        return arguments
    if option.takes == SWITCH:
        arguments["action"] = argparse.BooleanOptionalAction
        return arguments
    if option.takes == SEVERAL:
        arguments["action"] = "append"
    arguments["metavar"] = option.metavar
    if not as_text:
        arguments |= {"type": option.type, "choices": option.choices}
    return arguments
