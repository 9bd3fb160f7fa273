# SPDX-License-Identifier: Apache-2.0
"""A run's options from a file: ``--config FILE.toml``.

A snapshot holds the options of its machine in the same form, and they are read in the same way. It may not give options
that are about a run, such as --serial. Its paths are absolute, except those of sockets that would be too long for an
address. It may come from anybody: what it reaches of this host is only opened if the command line has the same option,
or trusts the snapshot.

A key is the long name of an option of the verb. The verb's table of options is the whole schema, so a new option is
also a new key. The file's options are put in front of the command line's words, unless the command line gives the same
option. After that, file and command line are not distinguished.

    kernel = "payload:echo"
    mem = "256M"                     # as on the command line; or a plain number protection = "pkvm"
    prefault = true                  # an option without a value
    params = ["quiet", "way=loop"]   # an option that may be repeated

    [[disk]]                         # an option with key=value parts: a table of parts, true for a key without a value
    path = "root.img" ro = true

Paths are relative to the current directory, as on the command line.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
from typing import TYPE_CHECKING, Any, Final, Self

from pyvmm.errors import OptionError, UsageError, did_you_mean
from pyvmm.options.entries import Entry, parse
from pyvmm.syntax.option import FLAG, MACHINE, RUN, SEVERAL, SWITCH
from pyvmm.syntax.parts import PartError, Parts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pyvmm.options.table import Table
    from pyvmm.syntax.option import Option

OPTION: Final = "--config"
RESTORE: Final = "--restore"


class OptionsFile:
    """The options file of a command line, checked against the ``table`` of its verb.

    Raises UsageError, with the key and its line, for an unknown key, for a value that the option refuses, and for keys
    that exclude each other.
    """

    def __init__(
        self,
        path: str,
        entries: Sequence[Entry],
        table: Table,
        verb: str,
        *,
        of: str = "a file",
        about: Sequence[str] = (MACHINE, RUN),
        trusted: bool = True,
    ) -> None:
        """Take the options that are ``about`` one of these. ``of`` is what may give them, in messages."""
        self._path, self._table, self._of, self._trusted = path, table, of, trusted
        options = {key: option for option in table if option.about in about for key in option.keys}
        self._entries = [(entry, self._option(options, entry, verb)) for entry in entries]
        self._refuse_rivals()

    @classmethod
    def of(cls, args: argparse.Namespace, table: Table) -> Self:
        """Return the file of ``--config``, or the options in the snapshot of ``--restore``.

        Also raises UsageError for a file that cannot be read.
        """
        if args.restore is None:
            return cls(args.config, read(args.config), table, args.verb)
        if args.config is not None:
            raise UsageError(
                f"{OPTION} and {RESTORE}: a snapshot already has the options of its machine", hint=f"drop {OPTION}"
            )
        if args.kernel is not None:
            raise UsageError(f"{args.kernel} with {RESTORE}: a snapshot already has its kernel", hint="drop the kernel")
        from pyvmm.machine.snapshot import Snapshot

        with Snapshot(args.restore) as snapshot:
            if args.verify:
                snapshot.verify()
            try:
                entries = parse(snapshot.options)
            except ValueError as error:
                raise UsageError(f"{args.restore} is damaged: its options are not TOML: {error}") from None
            # Options of a run, such as --serial and --trace, write to files of the host. No snapshot needs them.
            how: dict[str, Any] = {"of": "a snapshot", "about": (MACHINE,), "trusted": args.trust_snapshot}
            return cls(args.restore, entries, table, args.verb, **how)

    def put_before(self, words: Sequence[str]) -> list[str]:
        """Return ``words``, which follow the verb, with the file's options in front, except those that ``words`` give.

        Afterwards this object holds only the options that were used. Raises UsageError if one of them reaches something
        of the host, and the file is not trusted.
        """
        own = _without_config(words)
        by_command_line = self._table.given(own)
        spoken_for = {option.says for option in self._table if option.dest in by_command_line}
        self._entries = [(entry, option) for entry, option in self._entries if option.says not in spoken_for]
        if not self._trusted and (reached := list(self._reached())):
            names, words_of_them = zip(*reached, strict=True)
            raise UsageError(
                f"{self._path} would open what the command line does not name: {'; '.join(names)}",
                hint=f"repeat what it may open: {shlex.join(words_of_them)}; or allow all of it: --trust-snapshot",
            )
        return [*(word for entry, option in self._entries for word in self._words(option, entry)), *own]

    @property
    def opens(self) -> list[str]:
        """What the used options reach of the host, in words."""
        return [name for name, _ in self._reached()]

    def _reached(self) -> Iterator[tuple[str, str]]:
        """Yield what each option reaches of the host, and the option as a word. Nothing is imported or opened."""
        for entry, option in self._entries:
            if option.reaches is None or entry.value is False:
                continue
            for number, value in enumerate(entry.elements):
                text = self._text(entry, number, value)
                try:
                    reached = option.reaches(text)
                except (argparse.ArgumentTypeError, KeyError, UsageError):
                    continue  # an invalid value, which is refused when it is used
                if reached is not None:
                    yield reached, f"--{entry.key}={text}"

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """Add the key and line to errors that are raised within.

        A UsageError that is not about the file is suppressed. Running the guest raises it again.
        """
        try:
            yield
        except OptionError as error:
            if places := [place for entry, option in self._entries for place in self._places(entry, option, error)]:
                where = " and ".join(places)
                raise UsageError(f"{self._path}: {where}: {error.message}", hint=error.hint) from None
        except UsageError:
            pass

    def _places(self, entry: Entry, option: Option, error: OptionError) -> Iterator[str]:
        """Yield the part of an entry that an error is about, with its line: a table's key, an element, or the entry."""
        if option.takes == FLAG and not entry.value:
            return  # it adds no words
        alike = {key for each in self._table if each.says == option.says for key in each.keys}
        for name in error.options:
            element, _, part = name.partition(".")
            key, _, number = element.rstrip("]").partition("[")
            if key in alike:
                at = int(number or 0)
                table = entry.elements[at]
                there = isinstance(table, dict) and part in table
                yield f"{entry.key}{f'.{part}' if there else ''} (line {entry.line(at, part if there else None)})"

    # -- keys

    def _option(self, options: Mapping[str, Option], entry: Entry, verb: str) -> Option:
        if entry.key in options:
            return options[entry.key]
        raise UsageError(
            f"{self._path}, line {entry.line()}: {entry.key} is not an option of pyvmm {verb} that {self._of} may give",
            hint=did_you_mean(entry.key, options) or f"pyvmm {verb} --help lists them",
        )

    def _refuse_rivals(self) -> None:
        first: dict[str, Entry] = {}
        for entry, option in self._entries:
            if entry.value is False:
                continue
            if other := first.get(option.says):
                raise UsageError(
                    f"{self._path}, line {entry.line()}: {entry.key} contradicts {other.key} of line {other.line()}",
                    hint="leave one of them out",
                )
            first[option.says] = entry

    # -- values

    def _words(self, option: Option, entry: Entry) -> Iterator[str]:
        """Yield the words of a command line for an entry."""
        if option.takes in (FLAG, SWITCH):
            if not isinstance(entry.value, bool):
                raise self._wrong(entry, f"this option has no value: expected true or false, not {entry.value!r}")
            if entry.value:
                yield f"--{entry.key}"
            elif (opposite := f"no-{entry.key}") in option.keys:
                yield f"--{opposite}"
            return
        if isinstance(entry.value, list) and option.takes != SEVERAL:
            raise self._wrong(entry, "this option may be given only once: expected one value, not a list")
        for number, value in enumerate(entry.elements):
            text = self._text(entry, number, value)
            try:
                if isinstance(value, dict):
                    _refuse_unknown(option, value)
                checked = text if option.type is None else option.type(text)
            except PartError as error:
                raise self._wrong(entry, str(error), number, error.key) from None
            except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
                raise self._wrong(entry, str(error), number) from None
            except UsageError as error:
                raise self._wrong(entry, error.message, number, hint=error.hint) from None
            if option.choices is not None and checked not in option.choices:
                raise self._wrong(entry, f"{text!r} is not one of {', '.join(option.choices)}", number)
            yield f"--{entry.key}={text}"

    def _wrong(
        self, entry: Entry, why: str, number: int = 0, part: str | None = None, *, hint: str | None = None
    ) -> UsageError:
        return UsageError(f"{self._path}, line {entry.line(number, part)}: {entry.key}: {why}", hint=hint)

    def _text(self, entry: Entry, number: int, value: Any, part: str | None = None) -> str:
        match value:
            case str():
                return value
            case bool():
                raise self._wrong(entry, f"this option needs a value, not {str(value).lower()}", number, part)
            case int() | float():
                return str(value)
            case dict():
                return ",".join(
                    self._part(entry, number, key, each) for key, each in value.items() if each is not False
                )
            case _:
                raise self._wrong(entry, f"no option takes a {type(value).__name__}", number, part)

    def _part(self, entry: Entry, number: int, key: str, value: Any) -> str:
        if value is True:
            return key
        text = self._text(entry, number, value, key)
        if isinstance(value, dict) or "," in text:
            raise self._wrong(entry, f"{key}: {value!r} contains a comma, which would end the part", number, key)
        return f"{key}={text}"


def read(path: str) -> list[Entry]:
    """Return the entries of a file, in its order. Raises UsageError if it cannot be read or is not TOML."""
    try:
        with open(path, "rb") as file:
            return parse(file.read().decode())
    except OSError as error:
        raise UsageError(f"{OPTION} {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # of TOML, or of UTF-8
        raise UsageError(
            f"{OPTION} {path} is not TOML: {error}", hint="pyvmm run --print-config shows a file"
        ) from None


def _without_config(words: Sequence[str]) -> list[str]:
    left = []
    skip = False
    for word in words:
        if not skip and word != OPTION and not word.startswith(f"{OPTION}="):
            left.append(word)
        skip = not skip and word == OPTION
    return left


def _refuse_unknown(option: Option, table: Mapping[str, Any]) -> None:
    """Raise PartError for an unknown first key without a value.

    It would otherwise count as the value of the main key.
    """
    first = next(iter(table), "")
    if isinstance(option.type, Parts) and table.get(first) is True and first not in option.type.keys:
        raise PartError(first, f"{first!r} in {first!r} is not known; known are {option.type.known}")
