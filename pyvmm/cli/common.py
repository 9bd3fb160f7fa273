# SPDX-License-Identifier: Apache-2.0
"""What verbs share: common options, and the text of exit statuses."""

from __future__ import annotations

import argparse
import contextlib
import os

from pyvmm.errors import HostError, did_you_mean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Final, NoReturn

STATUSES: Final = """\
exit status:
  0  done; of run: the guest powered off      4  the deadline passed
  1  pyvmm failed                             5  this host cannot do what was asked
  2  the command line makes no sense        130  interrupted (128 + the signal's number)
  3  the guest crashed, was reset or failed
"""


LAB_ACTIONS: Final = ("build", "kernel", "status", "run", "exec", "shell")


class Help(argparse.RawDescriptionHelpFormatter):
    """Lays help out as wide as the terminal is.

    argparse makes a formatter for every option that it checks. Its default imports shutil to get the width, which would
    add six million instructions to every start.
    """

    def __init__(self, prog: str) -> None:
        columns = 0  # also what a terminal without a size reports, such as a serial one
        with contextlib.suppress(ValueError):
            columns = int(os.environ.get("COLUMNS", 0))
        if columns <= 0:
            with contextlib.suppress(OSError):
                columns = os.get_terminal_size().columns
        super().__init__(prog, width=(columns if columns > 0 else 80) - 2)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line, and then what to do; a page of usage is for --help."""

    _hint: str | None = None
    _mixing = False

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        from pyvmm.terminal import clean

        hint = self._hint or f"{self.prog} --help"
        self.exit(2, clean(f"{self.prog}: {message.rstrip()}\n  hint: {hint}\n"))

    def refuse(self, message: str, hint: str | None) -> NoReturn:
        """End with status 2; ``hint`` is what to do, None for a look at --help."""
        self._hint = hint
        self.error(message)

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride]  # one signature for its three
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """Parse the whole of a command line."""
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            self._verb_of(parsed)._refuse(rest, self)
        return parsed

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  # one signature for its three
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """Parse what is known of a command line, its words before, between and after its options."""
        parsed, rest = super().parse_known_args(args, namespace)
        # argparse gives such a positional the first words only. Nearly no command line needs the second pass.
        several = any(not each.option_strings and each.nargs in ("*", "+") for each in self._actions)
        if self._mixing or not several or all(word.startswith("-") for word in rest):
            return parsed, rest
        self._mixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False

    def _verb_of(self, parsed: argparse.Namespace) -> Parser:
        """Return the parser of the verb that the command line names, and of its action where that has some."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                verb = str(getattr(parsed, action.dest, None))
                if isinstance(found := action.choices.get(verb), Parser):
                    return found._verb_of(parsed)
        return self

    def _refuse(self, rest: Sequence[str], outer: Parser) -> NoReturn:
        """Say what is wrong with words that nobody takes, of which the first option brought the others about."""
        first = next((word for word in rest if word.startswith("-") and word != "-"), rest[0])
        if not first.startswith("-"):
            self.refuse(f"{first!r} is one word too many", None)
        name, _, _ = first.partition("=")
        known = self._option_string_actions
        verb = self.prog.removeprefix(outer.prog).strip()
        of_the_lab = name.startswith(("--lab-", "--host-kernel"))
        if of_the_lab and verb.startswith("lab"):  # the verb, which has some of these under names of its own
            own = f"--{name.removeprefix('--lab-')}"
            self.refuse(f"there is no option {name}", f"{self.prog} {own} ..." if own in known else None)
        if name in outer._option_string_actions and name not in known:
            lab = "--lab " if of_the_lab else ""
            self.refuse(f"{name} goes before the verb", f"{outer.prog} {lab}{name} ... {verb} ...")
        near = _nearest(name, [option for option in known if option.startswith("--")], self.prog)
        self.refuse(f"there is no option {name}", near)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        self._hint = _nearest(str(value), names, self.prog)
        if isinstance(action, argparse._SubParsersAction):
            if value in LAB_ACTIONS:
                self._hint = f"{self.prog} lab {value} ..."
            what = str(action.metavar).lower()
            raise argparse.ArgumentError(None, f"there is no {what} {value!r}; there are {', '.join(names)}")
        raise argparse.ArgumentError(action, f"{value!r} is none of {', '.join(names)}")


def _nearest(word: str, names: Sequence[str], prog: str) -> str | None:
    near = did_you_mean(word, names)
    return near and f"{near} {prog} --help lists them all"


def is_arm64() -> bool:
    """Whether KVM runs arm64 guests here, if it is there at all."""
    return os.uname().machine == "aarch64"


def require_arm64(args: argparse.Namespace, why: str, *, kvm: bool = False) -> None:
    """Raise HostError with ``why`` if KVM cannot run arm64 guests here; with ``kvm`` also if this user may not use KVM.

    Call it before anything slow.
    """
    if not is_arm64():
        import shlex

        raise HostError(
            f"this host is {os.uname().machine}, and {why}",
            hint=f"run it in the lab, an emulated arm64 host: pyvmm --lab {shlex.join(args.verb_argv)}",
        )
    if kvm:
        from pyvmm.kvm.system import System

        System.open().close()


def ready(args: argparse.Namespace) -> None:
    """Raise UsageError if the options name no kernel or contradict each other, HostError if no guest can run."""
    from pyvmm._native_source import require_fresh_native
    from pyvmm.options.contradictions import check_run, kernel_of

    check_run(args)
    kernel_of(args)
    require_arm64(args, "pyvmm's guests are arm64: KVM runs guests of its own architecture")
    require_fresh_native()


class _Misplaced(argparse.Action):
    """Catches ``--lab`` after the verb, where it would count as the verb's option."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        _namespace: argparse.Namespace,
        _values: str | Sequence[Any] | None,
        _option_string: str | None = None,
    ) -> None:
        verb = parser.prog.split()[-1]
        assert isinstance(parser, Parser), f"{parser.prog} is parsed by {type(parser).__name__}"
        parser.refuse("--lab goes before the verb", f"pyvmm --lab {verb} ...")


def add_common(parser: argparse.ArgumentParser, *, verb: bool = True) -> None:
    """Add the options that are valid before and after the verb to either parser."""
    # A verb's parser must not overwrite options before the verb, so it gets no defaults.
    default: Any = argparse.SUPPRESS if verb else 0
    add_messages(parser, default)
    if verb:
        # In a group, because a parser makes a formatter of help for each option of its own.
        parser._optionals.add_argument("--lab", action=_Misplaced, nargs=0, default=default, help=argparse.SUPPRESS)


def add_messages(parser: argparse.ArgumentParser, default: Any = argparse.SUPPRESS) -> None:
    """Add the options of events, for a parser whose outer one has them as well."""
    group = parser.add_argument_group("messages")
    group.add_argument("-v", "--verbose", action="count", default=default, help="log events; twice, with details")
    group.add_argument("-q", "--quiet", action="count", default=default, help="log errors only, not warnings")
    group.add_argument("--log-json", action="store_true", default=default, help="write events as JSON lines")
