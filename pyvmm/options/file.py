# SPDX-License-Identifier: Apache-2.0
"""A run's options from a file: ``--config FILE.toml``, and ``--print-config``, which writes such a file.

A snapshot holds the options of its machine in the same form, but with absolute paths (of a socket: where that can be
its address), and they are taken from there in the same way.

A key is the long name of an option of the verb, and that is all of the schema: it is asked of the parser, so an option
that is new is a key too. What the file says is put in front of the command line's own words, unless those say the same
thing themselves: from there on, nobody knows where an option came from.

    kernel = "payload:echo"
    mem = "256M"                     # as on the command line; a number where a number will do
    protection = "pkvm"
    prefault = true                  # an option without a value
    params = ["quiet", "way=loop"]   # one that may be repeated

    [[disk]]                         # one of key=value parts: a table is those parts, true the key alone
    path = "root.img"
    ro = true

Paths are relative to the current directory, as on the command line.
"""

from __future__ import annotations

import argparse
import math
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from pyvmm.errors import UsageError
from pyvmm.options.entries import Entry, parse
from pyvmm.syntax.parts import PartError, Parts

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    Action = argparse.Action

OPTION: Final = "--config"
RESTORE: Final = "--restore"
LEFT_OUT: Final = {"help", "config", "restore", "print-config", "dry-run", "lab", "verbose", "quiet", "log-json"}
"""Options that are about one invocation, not about the guest."""
OURS: Final = {
    "deadline",
    "dump-dtb",
    "gdb",
    "map",
    "prefault",
    "reboot",
    "serial",
    "socket",
    "stats",
    "trace",
    "trace-el2",
    "trace-faults",
}
"""Options about this side of a run, which whoever restores a snapshot of it says anew."""

PATHS: Final = {"disk": "path", "net": "socket", "vsock": "uds", "console": "file", "dtb": None}
"""Options of a machine that name a file which whoever restores it needs; what is before the path, None: it is all."""


def expand(words: Sequence[str], args: argparse.Namespace) -> list[str]:
    """Return the command line ``words``, of which ``args`` was parsed, with the options of its file in front.

    That is the file of ``--config``, or the snapshot of ``--restore``, which has those that it was saved with.
    Raises UsageError, with the key and its line, for a file that cannot be read, a key that is no option, a value that
    the option does not take, and for keys that contradict each other.
    """
    head = list(words[: len(words) - len(args.verb_argv)])
    verb, *rest = args.verb_argv
    rest = _without(rest)
    parser = verb_parser(verb)
    path, entries = _sources(args)
    actions = {entry.key: _action(parser, entry, path) for entry in entries}
    _refuse_contradictions(parser, entries, actions, path)
    spoken_for = _spoken_for(parser, vars(given(verb, rest)))
    kept = [entry for entry in entries if actions[entry.key].dest not in spoken_for]
    said = {entry.key: list(_words(actions[entry.key], entry, path)) for entry in kept}

    def line(words: Mapping[str, list[str]]) -> list[str]:
        return [*head, verb, *(word for each in words.values() for word in each), *rest]

    def is_right_with(entry: Entry) -> bool:
        """Whether there is nothing to refuse once an entry says this."""
        try:
            words = list(_words(actions[entry.key], entry, path))
        except UsageError:
            return False
        return _refusal(line({**said, entry.key: words})) is None

    if error := _refusal(line(said)):
        blamed = [entry for entry in kept if _refusal(line({**said, entry.key: []})) is None]
        if blamed:
            where = " and ".join(place for entry in blamed for place in _places(entry, is_right_with))
            raise UsageError(f"{path}: {where}: {error.message}", hint=error.hint)
    return line(said)


def _places(entry: Entry, is_right_with: Callable[[Entry], bool]) -> list[str]:
    """Name what of an entry alone is wrong, with its line: keys in tables, or else elements, or else all of it."""
    parts = [
        f"{entry.key}.{part} (line {entry.line(number, part)})"
        for number, element in enumerate(entry.elements)
        if isinstance(element, dict)
        for part in element
        if is_right_with(entry.without(number, part))
    ]
    several = range(len(entry.elements)) if len(entry.elements) > 1 and not parts else ()
    elements = [n for n in several if is_right_with(entry.without(n))] or [0]
    return parts or [f"{entry.key} (line {entry.line(number)})" for number in elements]


def _sources(args: argparse.Namespace) -> tuple[str, list[Entry]]:
    if args.restore is None:
        return args.config, read(args.config)
    if args.config is not None:
        raise UsageError(
            f"{OPTION} and {RESTORE}: a snapshot brings the options of its machine", hint=f"leave {OPTION} out"
        )
    if args.kernel is not None:
        raise UsageError(f"{args.kernel} with {RESTORE}: a snapshot brings its kernel", hint="leave the kernel out")
    from pyvmm.machine.snapshot import Snapshot

    with Snapshot(args.restore) as snapshot:
        return args.restore, parse(snapshot.options)


def verb_parser(verb: str) -> argparse.ArgumentParser:
    """Return the parser of a verb's own options."""
    verbs = argparse.ArgumentParser(prog="pyvmm", allow_abbrev=False).add_subparsers()
    import_module(f"pyvmm.cli.{verb}").add_parser(verbs)
    parser: argparse.ArgumentParser = verbs.choices[verb]
    return parser


def given(verb: str, words: Sequence[str]) -> argparse.Namespace:
    """Return what ``words`` themselves say of the options of ``verb``, as text, and nothing of what they do not."""
    parser = verb_parser(verb)
    parser._defaults.clear()
    for action in parser._actions:
        action.default, action.type, action.choices = argparse.SUPPRESS, None, None
    return parser.parse_args(words)


def _long(action: Action) -> list[str]:
    return [option[2:] for option in action.option_strings if option.startswith("--")]


def _options(parser: argparse.ArgumentParser) -> dict[str, Action]:
    return {name: action for action in parser._actions for name in _long(action) if not LEFT_OUT & set(_long(action))}


def _without(words: list[str]) -> list[str]:
    left = []
    skip = False
    for word in words:
        if not skip and word != OPTION and not word.startswith(f"{OPTION}="):
            left.append(word)
        skip = not skip and word == OPTION
    return left


def _refusal(words: list[str]) -> UsageError | None:
    """Return why a guest of such options makes no sense, if it is known without building one."""
    from pyvmm.cli import make_parser
    from pyvmm.cli.run import check_options

    try:
        check_options(make_parser(words).parse_args(words))
    except UsageError as error:
        return error
    return None


# -- the file


def read(path: str) -> list[Entry]:
    """Return what a file says, in its order. Raises UsageError for one that cannot be read or is no TOML."""
    try:
        with open(path, "rb") as file:
            return parse(file.read().decode())
    except OSError as error:
        raise UsageError(f"{OPTION} {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # of TOML, or of UTF-8
        raise UsageError(f"{OPTION} {path} is no TOML: {error}", hint="pyvmm run --print-config shows one") from None


def _action(parser: argparse.ArgumentParser, entry: Entry, path: str) -> Action:
    options = _options(parser)
    if entry.key in options:
        return options[entry.key]
    import difflib

    near = difflib.get_close_matches(entry.key, options, 1)
    raise UsageError(
        f"{path}, line {entry.line()}: {entry.key} is no option of {parser.prog} that a file may give",
        hint=f"did you mean {near[0]}?" if near else f"pyvmm {parser.prog.split()[-1]} --help lists them",
    )


def _refuse_contradictions(
    parser: argparse.ArgumentParser, entries: list[Entry], actions: dict[str, Action], path: str
) -> None:
    said: dict[int, Entry] = {}
    for entry in entries:
        if entry.value is False:
            continue
        rivals = [id(action) for action in _rivals(parser, actions[entry.key])]
        if other := next((said[rival] for rival in rivals if rival in said), None):
            raise UsageError(
                f"{path}, line {entry.line()}: {entry.key} contradicts {other.key} of line {other.line()}",
                hint="leave one of them out",
            )
        said[id(actions[entry.key])] = entry


def _rivals(parser: argparse.ArgumentParser, action: Action) -> list[Action]:
    """Return the options of which only one may be said, ``action`` with them."""
    groups = [group._group_actions for group in parser._mutually_exclusive_groups]
    same = [each for each in parser._actions if each.dest == action.dest]
    return same + [each for group in groups if action in group for each in group]


def _spoken_for(parser: argparse.ArgumentParser, said: dict[str, Any]) -> set[str]:
    """Return what the file has no say in, as the command line says it."""
    dests = {rival.dest for action in parser._actions if action.dest in said for rival in _rivals(parser, action)}
    # The kernel can be said in two ways.
    return dests | ({"kernel", "kernel_option"} if dests & {"kernel", "kernel_option"} else set())


def _words(action: Action, entry: Entry, path: str) -> Iterator[str]:
    """Yield the words of a command line for an entry."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(entry.value, bool):
            raise _wrong(entry, path, f"{entry.value!r} is given to an option without a value: true or false")
        if entry.value:
            yield f"--{entry.key}"
        elif isinstance(action, argparse.BooleanOptionalAction):
            yield f"--no-{entry.key}"
        return
    several = isinstance(action, argparse._AppendAction)
    if isinstance(entry.value, list) and not several:
        raise _wrong(entry, path, "a list is given to an option that is given once")
    for number, value in enumerate(entry.elements):
        text = _text(entry, number, value, path)
        try:
            if isinstance(value, dict):
                _refuse_unknown(action, value)
            checked = text if action.type is None else action.type(text)  # type: ignore[operator]
        except PartError as error:
            raise _wrong(entry, path, str(error), number, error.key) from None
        except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
            raise _wrong(entry, path, str(error), number) from None
        except UsageError as error:
            raise _wrong(entry, path, error.message, number) from None
        if action.choices is not None and checked not in action.choices:
            raise _wrong(entry, path, f"{text!r} is none of {', '.join(map(str, action.choices))}", number)
        yield f"--{entry.key}={text}"


def _refuse_unknown(action: Action, table: Mapping[str, Any]) -> None:
    """Raise PartError for a first key without a value that is none of the option's.

    Alone it would be taken for the value of the main one.
    """
    first = next(iter(table), "")
    if isinstance(action.type, Parts) and table.get(first) is True and first not in action.type.keys:
        raise PartError(first, f"{first!r} in {first!r} is not known; known are {action.type.known}")


def _wrong(entry: Entry, path: str, why: str, number: int = 0, part: str | None = None) -> UsageError:
    return UsageError(f"{path}, line {entry.line(number, part)}: {entry.key}: {why}")


def _text(entry: Entry, number: int, value: Any, path: str, part: str | None = None) -> str:
    match value:
        case str():
            return value
        case bool():
            raise _wrong(entry, path, f"{str(value).lower()} is given to an option that has a value", number, part)
        case int() | float():
            return str(value)
        case dict():
            return ",".join(_part(entry, number, key, each, path) for key, each in value.items() if each is not False)
        case _:
            raise _wrong(entry, path, f"no option takes a {type(value).__name__}", number, part)


def _part(entry: Entry, number: int, key: str, value: Any, path: str) -> str:
    if value is True:
        return key
    text = _text(entry, number, value, path, key)
    if isinstance(value, dict) or "," in text:
        raise _wrong(entry, path, f"{key}: {value!r} cannot be said here, where a comma ends a part", number, key)
    return f"{key}={text}"


# -- the other way


def machine_options(args: argparse.Namespace) -> str:
    """Return, as such a file, those options of ``args`` that make a machine what it is, for use in any directory."""
    return as_toml(args, only=_options(verb_parser("run")).keys() - OURS, directory=os.getcwd())


def as_toml(args: argparse.Namespace, *, only: Collection[str] | None = None, directory: str | None = None) -> str:
    """Return the options that ``args`` was parsed of, and the defaults of others that have a value, as such a file.

    ``only`` are the names of those that may be in it, all unless told. With ``directory`` the paths of :data:`PATHS`
    are absolute, of sockets as far as they can be; they are relative to it. UsageError for what cannot be said.
    """
    verb, *rest = args.verb_argv
    said = vars(given(verb, rest))
    parser = verb_parser(verb)
    if (kernel := said.pop("kernel", None)) is not None:
        said["kernel_option"] = kernel
    lines = []
    for action in {action.dest: action for action in reversed(_options(parser).values())}.values():
        if only is not None and _long(action)[0] not in only:
            continue
        if action.dest in said:
            value = said[action.dest]
        else:
            value = parser.get_default(action.dest)
            if value in (None, False) or not isinstance(value, bool | int | float | str) or value == argparse.SUPPRESS:
                continue
        if directory is not None:
            value = _absolute(_long(action)[0], value, directory)
        lines.append(f"{_long(action)[0]} = {_value(action, value)}\n")
    return "".join(reversed(lines))


def _absolute(option: str, value: Any, directory: str) -> Any:
    if option not in PATHS:
        return value
    if isinstance(value, list):
        return [_absolute(option, each, directory) for each in value]
    if PATHS[option] is None:
        return os.path.join(directory, value)
    parts = value.split(",")
    for number, part in enumerate(parts):
        key, equals, path = part.partition("=")
        if option == "disk" and number == 0 and not equals and key != "ro":
            key, path = "path", part
        if key == PATHS[option]:
            absolute = os.path.join(directory, path)
            if len(os.fsencode(absolute)) > _longest(option):
                continue  # it would be refused wherever it is restored: as it was said it serves in this directory
            parts[number] = f"{key}={absolute}"
            if "," in parts[number] and option != "console":
                raise UsageError(
                    f"{path!r} in {directory!r} cannot be said: a comma ends a part",
                    hint="run the guest in a directory without one",
                )
    return ",".join(parts)


def _longest(option: str) -> float:
    """Return how many bytes a path of an option may have: a Unix socket's address has few."""
    from pyvmm.devices.virtio.vsock_host import LONGEST_ADDRESS, LONGEST_PATH

    return {"net": LONGEST_ADDRESS, "vsock": LONGEST_PATH}.get(option, math.inf)


def _value(action: Action, value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_quoted(each) for each in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    if action.type is not None and text.isascii() and text.isdecimal() and str(int(text)) == text:
        return text
    return _quoted(text)


def _quoted(text: str) -> str:
    import json

    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{text!r} cannot be said in TOML, which is UTF-8") from None
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
