# SPDX-License-Identifier: Apache-2.0
"""The command line: one module a verb, this one finds it, runs it, and turns what it raises into words and a status.

A verb's module defines ``add_parser(subparsers)`` and ``main(args) -> int``. It is imported only when its name is on
the command line, and must not import anything heavy before its ``main`` runs. Modules that every command line needs
name TYPE_CHECKING themselves, as type checkers allow: to import ``typing`` costs a fifth of what parsing costs beyond
bare Python.

Exit statuses: 0 the guest powered off (or the verb did its work), 1 our error, 2 usage, 3 the guest crashed or was
reset, 4 deadline, 5 this host cannot do what was asked; 128 + the signal's number when one ended it.
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
    from typing import Any

VERBS = {
    "demo": "the whole story of a protected guest in one screen",
    "doctor": "what this machine can do, what is missing, how to get it",
    "run": "run a guest: an Image, an ELF, a flat binary, or payload:NAME",
    "map": "run a guest and show whose its pages are, live",
    "ctl": "ask or tell a running guest: info, counters, pause, resume, stop",
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
"""Objects, net of those freed, after which the collector looks for garbage."""

# How options begin that stand before a verb and say what lab it is.
LAB_OPTIONS = ("--lab", "--host-kernel")


class _Verbs(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Keeps the verb and its arguments as they were given, to be handed to the lab."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        namespace.verb_argv = list(values)
        super().__call__(parser, namespace, values, option_string)


def make_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser for ``argv``, complete for the verbs that occur in it."""
    parser = Parser(
        prog="pyvmm",
        description="A VMM for protected arm64 guests.",
        epilog=STATUSES,
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pyvmm {__version__}")
    add_common(parser, verb=False)
    group = parser.add_argument_group("the lab")
    group.add_argument(
        "--lab", action="store_true", help="run the verb in the lab, a nested pKVM host; see --lab --help"
    )
    if any(word.startswith(LAB_OPTIONS) for word in argv):
        import_module("pyvmm.cli.lab").add_lab_options(group)
    # What the verb's own usage begins with: argparse would lay out a page to find that.
    verbs = parser.add_subparsers(
        title="verbs", metavar="VERB", required=True, dest="verb", action=_Verbs, prog=parser.prog
    )
    # Verbs that are not meant are there for help and for errors alone.
    first = next((word for word in argv if not word.startswith("-")), "")
    known = {first: VERBS[first]} if first in VERBS else VERBS
    for verb, summary in known.items():
        if verb in argv:
            import_module(f"pyvmm.cli.{verb}").add_parser(verbs)
        else:
            verbs.add_parser(verb, help=summary, add_help=False)
    return parser


def refuse_lab_options(args: argparse.Namespace, words: Sequence[str]) -> None:
    """UsageError for options that say what lab it is, before a verb that no lab was asked for."""
    before = words[: len(words) - len(args.verb_argv)]
    for word in before:
        if word.startswith(LAB_OPTIONS):
            verb = " ".join(args.verb_argv[:2] if args.verb == "lab" else args.verb_argv[:1])
            right = f"pyvmm {verb} --host-kernel ..." if args.verb == "lab" else f"pyvmm --lab {word} ... {verb} ..."
            raise UsageError(f"{word} says what lab it is to be, but no lab was asked for", hint=right)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv`` unless given) and return its exit status."""
    # What a verb imports and builds stays: the collector would look through it every few hundred objects, for nothing.
    gc.set_threshold(GARBAGE)
    words = list(sys.argv[1:] if argv is None else argv)
    _fill_standard_files()
    try:
        args = make_parser(words).parse_args(words)
    except SystemExit as done:
        # argparse has said what there is to say: 0 after --help and --version, 2 after a wrong command line.
        return done.code if isinstance(done.code, int) else 2
    except PyvmmError as error:  # of a package that brings what an option names
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
            raise
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = "this is a bug in pyvmm: -v shows where; please report that with the output of pyvmm doctor --json"
        _complain(what, hint, as_json=bool(args.log_json))
        return 1
    return status


def with_file(words: Sequence[str], args: argparse.Namespace) -> tuple[list[str], argparse.Namespace]:
    """Return the command line ``words``, of which ``args`` was parsed, with its file's options in it, and both anew.

    Raises UsageError for what is wrong with the file, or with what it and the command line say together.
    """
    from pyvmm.options.file import OptionsFile
    from pyvmm.options.machine import check_options

    file = OptionsFile.of(args, import_module(f"pyvmm.cli.{args.verb}").TABLE)
    before = words[: len(words) - len(args.verb_argv)]
    whole = [*before, args.verb, *file.put_before(args.verb_argv[1:])]
    parsed = make_parser(whole).parse_args(whole)
    with file.blamed():
        check_options(parsed)
    return whole, parsed


def _fill_standard_files() -> None:
    """Open /dev/null where a standard file is closed: its number must not go to a guest's console or to KVM."""
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
        raise UsageError("there is no lab in the lab", hint=f"pyvmm {' '.join(args.verb_argv)}")
    flags = ["-v"] * args.verbose + ["-q"] * args.quiet + ["--log-json"] * bool(args.log_json)
    verb = import_module(f"pyvmm.cli.{args.verb}")
    if hasattr(verb, "main_in_lab"):  # one that does part of its work here
        return int(verb.main_in_lab(args, flags))
    return int(import_module("pyvmm.cli.lab").run_verb([*flags, *args.verb_argv], args))


def _complain(message: str, hint: str | None, *, as_json: bool) -> None:
    if as_json:
        from pyvmm import log

        log.get_logger("cli").error("failed", error=message, **({} if hint is None else {"hint": hint}))
        return
    print(f"pyvmm: {message}", file=sys.stderr)
    if hint is not None:
        print(f"  hint: {hint}", file=sys.stderr)


def _reader_gone() -> int:
    """Whoever read our output has left: end as SIGPIPE would have ended us, without a word."""
    # The interpreter flushes stdout once more at exit; it must not complain then.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
    return 141
