# SPDX-License-Identifier: Apache-2.0
"""The filter of system calls, as its program answers them: every rule allows what it says, and nothing else passes."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.confine.program import ABSENT, ARCHITECTURES, REFUSED, assemble
from pyvmm.confine.rules import MISSING, RULES, SELF, Condition, Rule, rules_of
from pyvmm.uapi.seccomp import SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS
from pyvmm.uapi.unistd import MACHINES, NUMBERS, number

PARTS = sorted({rule.part for rule in RULES} - {""})
VALUES = {SELF: (4242,), "passt": (77, 78)}
WORD = 2**32 - 1

LOAD, KEEP, EQUAL, ANSWER = 0x20, 0x54, 0x15, 0x06


def answer(program: bytes, nr: int, arguments: tuple[int, ...] = (), architecture: int = 0) -> int:
    """Run a program as the kernel does. Fails if it reads or jumps outside."""
    arguments = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("=iIQ6Q", nr, architecture, 0, *arguments)
    code = list(struct.iter_unpack("=HBBI", program))
    at, word = 0, 0
    while True:
        operation, yes, no, operand = code[at]
        at += 1
        if operation == LOAD:
            assert operand % 4 == 0
            (word,) = struct.unpack_from("=I", data, operand)
        elif operation == KEEP:
            word &= operand
        elif operation == EQUAL:
            at += yes if word == operand else no
        else:
            assert operation == ANSWER, f"unknown operation {operation:#x}"
            return int(operand)


class Filter:
    """The filter of a machine."""

    def __init__(self, machine: str, parts: list[str]) -> None:
        self.machine = machine
        self.program = assemble(rules_of(parts), machine, VALUES)

    def __call__(self, call: str, *arguments: int) -> int:
        nr = number(call, self.machine)
        assert nr is not None
        return answer(self.program, nr, arguments, ARCHITECTURES[self.machine])


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def satisfying(rule: Rule) -> Iterator[tuple[int, ...]]:
    """Yield arguments that all tests of a rule accept, with ones in every bit that no test looks at."""
    choices = [VALUES[test.value] if isinstance(test.value, str) else (test.value,) for test in rule.when]
    for chosen in zip(*choices, strict=True) if choices else [()]:
        arguments = [2**64 - 1] * 6
        for test, value in zip(rule.when, chosen, strict=True):
            arguments[test.argument] = arguments[test.argument] & ~test.mask | value
        yield tuple(arguments)


def said(thing: object) -> str:
    return "-".join([thing.call, *(test.says for test in thing.when)]) if isinstance(thing, Rule) else str(thing)


@pytest.mark.parametrize(
    ("machine", "rule"),
    [(machine, rule) for machine in MACHINES for rule in RULES if number(rule.call, machine) is not None],
    ids=said,
)
def test_a_rule_allows_what_it_says(machine: str, rule: Rule) -> None:
    allowed = Filter(machine, PARTS)
    for arguments in satisfying(rule):
        assert allowed(rule.call, *arguments) == SECCOMP_RET_ALLOW


def test_each_bit_of_a_test_counts(machine: str) -> None:
    filtered = Filter(machine, PARTS)
    count = 0
    for rule in RULES:
        if not rule.when or number(rule.call, machine) is None:
            continue
        for arguments in satisfying(rule):
            for test in rule.when:
                for bit in range(64):
                    if not test.mask >> bit & 1:
                        continue
                    changed = list(arguments)
                    changed[test.argument] ^= 1 << bit
                    wanted = SECCOMP_RET_ALLOW if allowed_by_another(rule.call, changed) else REFUSED
                    assert filtered(rule.call, *changed) == wanted, (rule, bit)
                    count += 1
    assert count > 1000


def allowed_by_another(call: str, arguments: list[int]) -> bool:
    """Whether the data itself allows a call."""
    return any(
        all(
            arguments[test.argument] & test.mask
            in (VALUES[test.value] if isinstance(test.value, str) else [test.value])
            for test in rule.when
        )
        for rule in RULES
        if rule.call == call
    )


def test_the_rest_is_refused(machine: str) -> None:
    filtered = Filter(machine, PARTS)
    allowed = {number(rule.call, machine) for rule in RULES}
    absent = {number(call, machine) for call in MISSING}
    for nr in set(range(600)) - allowed - absent:
        assert answer(filtered.program, nr, (), ARCHITECTURES[machine]) == REFUSED
    assert REFUSED & 0xFFFF == errno.EPERM
    # The numbers of the x32 ABI have the same architecture as those of x86-64.
    for other in allowed - {None}:
        assert other is not None
        assert answer(filtered.program, 0x4000_0000 | other, (), ARCHITECTURES[machine]) == REFUSED


def test_calls_whose_arguments_are_in_memory_are_absent(machine: str) -> None:
    assert Filter(machine, PARTS)("clone3", 1, 88) == ABSENT
    assert ABSENT & 0xFFFF == errno.ENOSYS


def test_calls_of_another_architecture_end_the_process(machine: str) -> None:
    program = assemble(rules_of([]), machine, VALUES)
    for architecture in (*(set(ARCHITECTURES.values()) - {ARCHITECTURES[machine]}), 0x4000_0003):
        assert answer(program, 0, (), architecture) == SECCOMP_RET_KILL_PROCESS


def test_no_part_brings_what_a_run_must_never_do(machine: str) -> None:
    filtered = Filter(machine, PARTS)
    executable, kvm_create_vm, tiocsti = 0x7, 0xAE01, 0x5412
    assert filtered("mmap", 0, 4096, executable, 0x22) == REFUSED
    assert filtered("mprotect", 0, 4096, executable) == REFUSED
    assert filtered("ioctl", 3, kvm_create_vm) == REFUSED
    assert filtered("ioctl", 0, tiocsti) == REFUSED
    assert filtered("clone", 17) == REFUSED  # fork
    assert filtered("clone", 0x4111) == REFUSED  # vfork
    assert filtered("socket", 2, 1) == REFUSED  # AF_INET
    assert filtered("kill", 1, 9) == REFUSED
    assert filtered("tgkill", 1, 1, 9) == REFUSED
    assert filtered("fcntl", 0, 8) == REFUSED  # F_SETOWN: signals to others
    assert filtered("prctl", 4, 1) == REFUSED  # PR_SET_DUMPABLE
    names = {rule.call for rule in RULES}
    assert not names & {"open", "openat", "openat2", "execve", "execveat", "fork", "vfork", "ptrace", "bind", "bpf"}


def test_a_part_that_is_absent_allows_nothing(machine: str) -> None:
    without = Filter(machine, [])
    assert without("socket", 1, 1) == REFUSED
    assert without("connect") == REFUSED
    assert without("kill", 77, 15) == REFUSED
    assert without("ioctl", 3, 0xC028AA03) == REFUSED
    assert Filter(machine, ["vsock"])("socket", 1, 1) == SECCOMP_RET_ALLOW


def test_a_name_without_numbers_is_never_true(machine: str) -> None:
    program = assemble(rules_of(["passt"]), machine, {SELF: (1,)})
    kill = number("kill", machine)
    assert kill is not None
    assert answer(program, kill, (0, 9), ARCHITECTURES[machine]) == REFUSED


def test_a_vcpu_passes_few_instructions(machine: str) -> None:
    # The kernel runs the program at every KVM_RUN, whose command it cannot remember.
    code = assemble(rules_of([]), machine, VALUES)
    first = struct.unpack_from("=HBBI", code, 8 * 4)
    assert first[3] == number("ioctl", machine)
    assert len(code) // 8 < 4096
    assert struct.unpack_from("=HBBI", code, 8 * 6)[3] == 0xAE80


def test_other_machines_have_no_rules() -> None:
    with pytest.raises(ValueError, match="no rules for riscv64"):
        assemble(rules_of([]), "riscv64", VALUES)


@given(
    tests=st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 2**64 - 1), st.integers(0, 2**64 - 1)), min_size=1, max_size=3
    ),
    arguments=st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6),
    near=st.booleans(),
)
def test_any_tests_mean_what_they_say(tests: list[tuple[int, int, int]], arguments: list[int], near: bool) -> None:
    when = tuple(Condition(argument, mask, value & mask, "") for argument, mask, value in tests)
    if near:
        for test in when:
            arguments[test.argument] = arguments[test.argument] & ~test.mask | int(test.value)
    program = assemble([Rule("read", "", when), Rule("read", "", when[:1])], "x86_64", {})
    true = all(arguments[test.argument] & test.mask == test.value for test in when[:1])
    wanted = SECCOMP_RET_ALLOW if true else REFUSED
    assert answer(program, 0, tuple(arguments), ARCHITECTURES["x86_64"]) == wanted


def test_every_rule_has_a_number_and_a_reason() -> None:
    for rule in RULES:
        assert rule.call in NUMBERS
        assert rule.why
    for call, numbers in NUMBERS.items():
        assert len(numbers) == len(MACHINES)
        assert any(nr is not None for nr in numbers), call
