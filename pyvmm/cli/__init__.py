# SPDX-License-Identifier: Apache-2.0
"""The command line: find the verb's module, run it, and turn its exception into a message and an exit status.

A verb's module defines ``add_parser(subparsers)`` and ``main(args) -> int``. It is imported only when its name is on
the command line, and must not import anything heavy before its ``main`` runs. Modules that every command line needs
define TYPE_CHECKING themselves, which type checkers allow. Importing ``typing`` would add a fifth to the cost of
parsing.

Exit statuses: 0 the guest powered off, or the verb did its work. 1 pyvmm failed. 2 usage. 3 the guest crashed or was
reset. 4 deadline. 5 this host cannot do it. 128 + N signal N ended the verb.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from importlib import import_module

from pyvmm import __version__
from pyvmm.cli.common import STATUSES, Help, Parser, add_common
from pyvmm.errors import PyvmmError, UsageError, exhausted, without_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Any

VERBS = {
    "demo": "the life of a protected guest in one screen",
    "doctor": "what this machine can do, what is missing, how to get it",
    "run": "run a guest: an Image, an ELF, a flat binary, or payload:NAME",
    "map": "run a guest and show who owns its pages, live",
    "ctl": "control a running guest: info, counters, pause, resume, stop",
    "top": "how busy a running guest is: exits by kind, where its time goes",
    "trace": "run a guest and record its exits for ui.perfetto.dev",
    "lab": "a pKVM host on any Linux machine: build it, run commands in it",
    "atlas": "what this kernel does with guest memory, claim by claim",
    "bench": "what a fault, an exit, a share, a conversion costs",
    "repl": "a live guest at a Python prompt",
    "help": "the documentation, a page a topic",
    "completion": "a script that completes command lines, for a shell",
}


GARBAGE = 100_000
"""Garbage collection threshold: allocated objects minus freed ones."""

# Prefixes of the options before a verb that configure the lab.
LAB_OPTIONS = ("--lab", "--host-kernel")


class _Verbs(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Keeps the verb and its arguments as typed, to pass them to the lab."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        namespace.verb_argv = list(values)
        super().__call__(parser, namespace, values, option_string)


def make_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser for ``argv``, complete for the verbs in it."""
    parser = Parser(
        prog="pyvmm",
        description="A VMM for protected arm64 guests.",
        epilog=STATUSES,
        formatter_class=Help,
        allow_abbrev=False,
    )
    # In a group, because a parser makes a formatter of help for each option of its own.
    parser._optionals.add_argument("--version", action="version", version=f"pyvmm {__version__}")
    add_common(parser, verb=False)
    group = parser.add_argument_group("the lab")
    group.add_argument(
        "--lab", action="store_true", help="run the verb in the lab, a nested pKVM host; see --lab --help"
    )
    if any(word.startswith(LAB_OPTIONS) for word in argv):
        import_module("pyvmm.cli.lab").add_lab_options(group)
    # The start of the verb's usage line. argparse would format the whole help page to find it.
    verbs = parser.add_subparsers(
        title="verbs", metavar="VERB", required=True, dest="verb", action=_Verbs, prog=parser.prog
    )
    # Other verbs only appear in the help and in errors.
    first = next((word for word in argv if not word.startswith("-")), "")
    known = {first: VERBS[first]} if first in VERBS else VERBS
    for verb, summary in known.items():
        if verb in argv:
            import_module(f"pyvmm.cli.{verb}").add_parser(verbs)
        else:
            verbs.add_parser(verb, help=summary, add_help=False)
    return parser


def refuse_lab_options(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Raise UsageError for options that configure a lab when ``--lab`` is missing."""
    before = words[: len(words) - len(args.verb_argv)]
    for word in before:
        if word.startswith(LAB_OPTIONS):
            verb = " ".join(args.verb_argv[:2] if args.verb == "lab" else args.verb_argv[:1])
            right = f"pyvmm {verb} --host-kernel ..." if args.verb == "lab" else f"pyvmm --lab {word} ... {verb} ..."
            raise UsageError(f"{word} configures the lab, but --lab is missing", hint=right)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv`` unless given) and return its exit status."""
    # What a verb imports and builds stays alive. The collector would scan it every few hundred objects and free
    # nothing.
    gc.set_threshold(GARBAGE)
    words = list(sys.argv[1:] if argv is None else argv)
    _fill_standard_files()
    try:
        args = make_parser(words).parse_args(words)
    except SystemExit as done:
        # argparse has printed its text: status 0 after --help and --version, 2 after a wrong command line.
        return done.code if isinstance(done.code, int) else 2
    except PyvmmError as error:  # raised by a package that an option names
        _complain(error.message, error.hint, as_json="--log-json" in words)
        return error.exit_status
    from pyvmm import log  # not for --help

    log.configure(args.verbose - args.quiet, json=bool(args.log_json))
    try:
        if (getattr(args, "config", None) or getattr(args, "restore", None)) is not None:
            words, args = with_file(words, args)
        if getattr(args, "print_config", False):
            table = import_module(f"pyvmm.cli.{args.verb}").TABLE
            print(import_module("pyvmm.options.written").as_toml(args, table), end="")
            status = 0
        else:
            status = _dispatch(args, words)
        sys.stdout.flush()
    except PyvmmError as error:
        error = exhausted(error) or error
        _complain(error.message, error.hint, as_json=bool(args.log_json))
        return error.exit_status
    except KeyboardInterrupt as interrupt:
        from pyvmm.interrupt import Interrupted

        return 128 + (interrupt.signal if isinstance(interrupt, Interrupted) else 2)
    except BrokenPipeError:
        return _reader_gone()
    except Exception as error:
        if known := exhausted(error) or without_directory(error):
            _complain(known.message, known.hint, as_json=bool(args.log_json))
            return known.exit_status
        if args.verbose:
            sys.excepthook = _tell_traceback
            raise
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = "this is a bug in pyvmm; -v shows where. Please report it with the output of pyvmm doctor --json"
        _complain(what, hint, as_json=bool(args.log_json))
        return 1
    return status


def with_file(words: Sequence[str], args: argparse.Namespace) -> tuple[list[str], argparse.Namespace]:
    """Insert the options of the ``--config`` file into the command line ``words``, and parse it again.

    Returns the new words and arguments. Raises UsageError for an error in the file, or a conflict between both.
    """
    from pyvmm.options.file import OptionsFile
    from pyvmm.options.machine import check_options

    file = OptionsFile.of(args, import_module(f"pyvmm.cli.{args.verb}").TABLE)
    before = words[: len(words) - len(args.verb_argv)]
    whole = [*before, args.verb, *file.put_before(args.verb_argv[1:])]
    if args.restore is not None:
        _tell_what_opens(args, file.opens)
    parsed = make_parser(whole).parse_args(whole)
    with file.blamed():
        check_options(parsed)
    return whole, parsed


def _tell_what_opens(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Say what of this host a trusted snapshot opens, unless the user wants errors only."""
    from pyvmm.terminal import say

    for name in names if args.quiet <= args.verbose else ():
        if args.log_json:
            from pyvmm import log

            log.get_logger("cli").warning("snapshot_opens", snapshot=args.restore, what=name)
        else:
            say(f"pyvmm: {args.restore} opens {name}")


def _fill_standard_files() -> None:
    """Open /dev/null for each closed standard file, so that a console or KVM does not get its number."""
    null = os.open(os.devnull, os.O_RDWR)
    while null < 3:
        os.set_inheritable(null, True)
        null = os.dup(null)
    os.close(null)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


def _dispatch(args: argparse.Namespace, words: Sequence[str]) -> int:
    if not args.lab:
        refuse_lab_options(args, words)
        if getattr(args, "dry_run", False):
            return int(import_module("pyvmm.cli.run").dry_run(args))
        return int(import_module(f"pyvmm.cli.{args.verb}").main(args))
    if args.verb == "lab":
        raise UsageError("already in the lab: drop --lab", hint=f"pyvmm {' '.join(args.verb_argv)}")
    flags = ["-v"] * args.verbose + ["-q"] * args.quiet + ["--log-json"] * bool(args.log_json)
    verb = import_module(f"pyvmm.cli.{args.verb}")
    if hasattr(verb, "main_in_lab"):  # this verb does part of its work on this host
        return int(verb.main_in_lab(args, flags))
    return int(import_module("pyvmm.cli.lab").run_verb([*flags, *args.verb_argv], args))


def _complain(message: str, hint: str | None, *, as_json: bool) -> None:
    if as_json:
        from pyvmm import log

        log.get_logger("cli").error("failed", error=message, **({} if hint is None else {"hint": hint}))
        return
    from pyvmm.terminal import say

    say(f"pyvmm: {message}")
    if hint is not None:
        say(f"  hint: {hint}")


def _tell_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    import traceback

    from pyvmm.terminal import say

    say("".join(traceback.format_exception(kind, error, trace)).rstrip())


def _reader_gone() -> int:
    """End silently, as SIGPIPE would have ended us: the reader of our output is gone."""
    # The interpreter flushes stdout once more at exit; it must not complain then.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
    return 141
