# SPDX-License-Identifier: Apache-2.0
"""Write the rules as a program of classic BPF, which the kernel runs at each system call. Owns nothing.

The program reads ``struct seccomp_data``: the call's number, the machine's architecture, the six arguments. It compares
words of 32 bits, and jumps forwards only. So each rule is a block: its tests jump behind it when they fail.
"""

from __future__ import annotations

import errno
import struct

from pyvmm.confine.rules import MISSING, WORD
from pyvmm.uapi.seccomp import (
    AUDIT_ARCH_AARCH64,
    AUDIT_ARCH_X86_64,
    BPF_ABS,
    BPF_ALU,
    BPF_AND,
    BPF_JEQ,
    BPF_JMP,
    BPF_K,
    BPF_LD,
    BPF_RET,
    BPF_W,
    SECCOMP_RET_ALLOW,
    SECCOMP_RET_ERRNO,
    SECCOMP_RET_KILL_PROCESS,
)
from pyvmm.uapi.unistd import number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Final

    from pyvmm.confine.rules import Condition, Rule

REFUSED: Final = SECCOMP_RET_ERRNO | errno.EPERM
ABSENT: Final = SECCOMP_RET_ERRNO | errno.ENOSYS

ARCHITECTURES: Final = {"aarch64": AUDIT_ARCH_AARCH64, "x86_64": AUDIT_ARCH_X86_64}

# Offsets in struct seccomp_data.
_NUMBER: Final = 0
_ARCHITECTURE: Final = 4
_ARGUMENTS: Final = 16

_LOAD: Final = BPF_LD | BPF_W | BPF_ABS
_EQUAL: Final = BPF_JMP | BPF_JEQ | BPF_K
_KEEP: Final = BPF_ALU | BPF_AND | BPF_K
_ANSWER: Final = BPF_RET | BPF_K
_INSTRUCTION: Final = struct.Struct("=HBBI")
"""struct sock_filter: the operation, how far to jump if true and if false, and the operand."""

_MOST_JUMP: Final = 255


def assemble(
    rules: Iterable[Rule],
    machine: str,
    values: Mapping[str, Sequence[int]],
    *,
    otherwise: int = REFUSED,
) -> bytes:
    """Return the program that allows what ``rules`` allow on ``machine``, and answers ``otherwise`` to the rest.

    ``values`` are the numbers of the tests' names. Calls of another architecture end the process. Raises ValueError
    for a machine without rules.
    """
    if machine not in ARCHITECTURES:
        raise ValueError(f"there are no rules for {machine}")
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (_ANSWER, 0, 0, SECCOMP_RET_KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
    ]
    by_call: dict[str, list[Rule]] = {}
    for rule in rules:
        by_call.setdefault(rule.call, []).append(rule)
    for call, alternatives in by_call.items():
        if (nr := number(call, machine)) is None:
            continue
        body = _body(alternatives, values, otherwise)
        code += _behind(nr, body)
    for call in MISSING:
        if (nr := number(call, machine)) is not None:
            code += _behind(nr, [(_ANSWER, 0, 0, ABSENT)])
    code.append((_ANSWER, 0, 0, otherwise))
    return b"".join(_INSTRUCTION.pack(*each) for each in code)


_Code = tuple[int, int, int, int]


def _behind(nr: int, body: list[_Code]) -> list[_Code]:
    """Return ``body`` behind a test for the call: the program goes on behind it for other calls."""
    if len(body) > _MOST_JUMP:
        raise ValueError(f"the rules of call {nr} take {len(body)} instructions, over {_MOST_JUMP}")
    return [(_EQUAL, 0, len(body), nr), *body]


def _body(rules: Sequence[Rule], values: Mapping[str, Sequence[int]], otherwise: int) -> list[_Code]:
    """Return what answers a call that has these rules. It always answers."""
    if any(not rule.when for rule in rules):
        return [(_ANSWER, 0, 0, SECCOMP_RET_ALLOW)]
    if simple := _one_word(rules, values):
        # Comparing one word with many numbers: an instruction a number, and one answer for all.
        (argument, mask), numbers = simple
        code = _word(argument, 0, mask)
        for at, each in enumerate(numbers):
            code.append((_EQUAL, len(numbers) - at, 0, each))
        return [*code, (_ANSWER, 0, 0, otherwise), (_ANSWER, 0, 0, SECCOMP_RET_ALLOW)]
    code = []
    for rule in rules:
        for tests in _resolved(rule.when, values):
            code += _all_of(tests)
    return [*code, (_ANSWER, 0, 0, otherwise)]


def _one_word(rules: Sequence[Rule], values: Mapping[str, Sequence[int]]) -> tuple[tuple[int, int], list[int]] | None:
    """Return argument, mask and numbers of rules that all compare the low word of one argument, or None."""
    tests = [rule.when[0] for rule in rules]
    if any(len(rule.when) != 1 for rule in rules) or any(test.mask > WORD for test in tests):
        return None
    places = {(test.argument, test.mask) for test in tests}
    if len(places) != 1:
        return None
    numbers = [
        each
        for test in tests
        for each in ((test.value,) if isinstance(test.value, int) else values.get(test.value, ()))
    ]
    return places.pop(), numbers


def _resolved(tests: Sequence[Condition], values: Mapping[str, Sequence[int]]) -> list[list[Condition]]:
    """Return the tests once for each choice of the numbers that their names stand for."""
    found: list[list[Condition]] = [[]]
    for test in tests:
        choices = (test.value,) if isinstance(test.value, int) else values.get(test.value, ())
        found = [[*before, test._replace(value=each)] for before in found for each in choices]
    return found


def _all_of(tests: Sequence[Condition]) -> list[_Code]:
    """Return what allows the call if all ``tests`` are true, and else goes on behind itself."""
    parts = []
    for test in tests:
        assert isinstance(test.value, int)
        for half in (0, 1):
            mask, value = test.mask >> 32 * half & WORD, test.value >> 32 * half & WORD
            if mask:
                parts.append((_word(test.argument, half, mask), value))
    code: list[_Code] = [(_ANSWER, 0, 0, SECCOMP_RET_ALLOW)]
    for load, value in reversed(parts):
        code = [*load, (_EQUAL, 0, len(code), value), *code]
    return code


def _word(argument: int, half: int, mask: int) -> list[_Code]:
    """Return what loads the bits of ``mask`` of one half of an argument. Both machines are little-endian."""
    load = (_LOAD, 0, 0, _ARGUMENTS + 8 * argument + 4 * half)
    return [load] if mask == WORD else [load, (_KEEP, 0, 0, mask)]
