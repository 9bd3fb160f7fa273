# SPDX-License-Identifier: Apache-2.0
"""pyvmm.uapi against the kernel's headers, for arm64 and x86: every fact of the ABI is checked."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from ctypes import Structure, Union, c_uint8, sizeof
from typing import Any

import pytest

import pyvmm.uapi
from pyvmm.confine import rules
from pyvmm.uapi import kvm, kvm_arm64, kvm_cap, kvm_run, kvm_x86, psci, unistd, userfaultfd
from pyvmm.uapi.ioctl import Ioctl
from tests.abi import abi_facts, abi_headers, abi_members
from tests.abi.abi_facts import MACHINES, Fact

OTHER_ARCHITECTURES = ("PPC", "S390", "MIPS", "SPAPR", "RISCV", "HYPERV", "XEN", "IRQ_MPIC", "IRQ_XICS", "SW_TLB")


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> str:
    """Give an architecture that has headers and a compiler here."""
    try:
        abi_facts.tools(request.param)
        abi_headers.root()
    except (LookupError, abi_headers.NoHeaders) as reason:
        pytest.skip(str(reason))
    return str(request.param)


def wrong(facts: list[Fact], machine: str) -> list[str]:
    answers = abi_facts.measure([fact.expression for fact in facts], machine)
    assert len(answers) == len(facts)
    return [
        f"{fact.expression}: the header says {answer:#x}, pyvmm {fact.value:#x}"
        for fact, answer in zip(facts, answers, strict=True)
        if answer != fact.value % 2**64
    ]


def test_every_structure_has_the_size_and_fields_of_its_header(machine: str) -> None:
    kinds = abi_facts.structures(machine).values()
    facts = [fact for kind in kinds for fact in abi_facts.structure_facts(kind, machine)]
    assert len(facts) > 300
    assert wrong(facts, machine) == []


def test_no_structure_leaves_a_field_out(machine: str) -> None:
    kinds = abi_facts.structures(machine)
    assert {name: lost for name, kind in kinds.items() if (lost := abi_members.missing(kind, machine))} == {}


def test_every_constant_and_request_has_the_number_of_its_header(machine: str) -> None:
    facts = list(abi_facts.constant_facts(machine))
    assert {"KVM_RUN", "KVM_CAP_GUEST_MEMFD", "KVM_EXIT_MMIO", "MADV_DONTFORK", "F_SEAL_GROW"} <= {
        fact.expression for fact in facts
    }
    assert wrong(facts, machine) == []


def test_every_system_call_has_the_number_of_its_header(machine: str) -> None:
    at = unistd.MACHINES.index(machine)
    facts = [Fact(f"__NR_{call}", nr) for call, numbers in unistd.NUMBERS.items() if (nr := numbers[at]) is not None]
    assert len(facts) > 80
    assert wrong(facts, machine) == []


def test_the_rules_of_confinement_have_the_numbers_of_their_names(machine: str) -> None:
    facts = [
        Fact(test.says, test.value)
        for rule in rules.RULES
        for test in rule.when
        if re.fullmatch("[A-Z0-9_]+", test.says) and isinstance(test.value, int)
    ]
    # On x86 a guest's debug registers have another size, and runs are of arm64 guests. Families of sockets are libc's.
    others = {"AF_UNIX"} if machine == "aarch64" else {"AF_UNIX", "KVM_SET_GUEST_DEBUG"}
    facts = [fact for fact in facts if fact.expression not in others]
    flags = "VM FS FILES SIGHAND THREAD SYSVSEM SETTLS PARENT_SETTID CHILD_CLEARTID"
    facts.append(Fact(" | ".join(f"CLONE_{flag}" for flag in flags.split()), rules.THREAD))
    assert len(facts) > 40
    assert wrong(facts, machine) == []


def test_functions_compute_the_same_as_the_macros(machine: str) -> None:
    facts = [Fact(f"KVM_REG_SIZE({id:#x}ULL)", kvm.KVM_REG_SIZE(id)) for id in (0, kvm.KVM_REG_SIZE_U2048, 7 << 52)]
    if machine == "aarch64":
        core = "KVM_REG_ARM64 | KVM_REG_ARM_CORE | KVM_REG_ARM_CORE_REG"
        named = {
            "x0": "regs.regs[0]",
            "x30": "regs.regs[30]",
            "sp": "regs.sp",
            "pc": "regs.pc",
            "pstate": "regs.pstate",
            "sp_el1": "sp_el1",
            "elr_el1": "elr_el1",
            "spsr_el1": "spsr[KVM_SPSR_EL1]",
        }
        facts += [Fact(f"{core}({c}) | KVM_REG_SIZE_U64", kvm_arm64.core_reg(name)) for name, c in named.items()]
        vectors = {f"v{n}": f"{core}(fp_regs.vregs[{n}]) | KVM_REG_SIZE_U128" for n in (0, 7, 31)}
        words = {name: f"{core}(fp_regs.{name}) | KVM_REG_SIZE_U32" for name in ("fpsr", "fpcr")}
        facts += [Fact(c, kvm_arm64.core_reg(name)) for name, c in (vectors | words).items()]
        facts += [
            Fact("ARM64_SYS_REG(3, 7, 15, 11, 5)", kvm_arm64.ARM64_SYS_REG(3, 7, 15, 11, 5)),
            Fact("KVM_REG_ARM_FW_REG(0x12345)", kvm_arm64.KVM_REG_ARM_FW_REG(0x12345)),
            Fact("KVM_REG_ARM_FW_FEAT_BMAP_REG(9)", kvm_arm64.KVM_REG_ARM_FW_FEAT_BMAP_REG(9)),
            Fact("PSCI_VERSION(1, 3)", psci.PSCI_VERSION(1, 3)),
        ]
    else:
        facts.append(Fact("KVM_REG_X86 | KVM_REG_SIZE_U64 | 2ULL << 32 | 0x10", kvm_x86.KVM_X86_REG_MSR(0x10)))
    assert wrong(facts, machine) == []


def test_no_capability_or_exit_reason_is_missing(machine: str) -> None:
    """Checks up to the newest known number. Newer kernels may have more."""
    known = {name for name in vars(kvm_cap) if name.startswith("KVM_CAP_")}
    theirs = {name for name in abi_facts.macros(machine) if name.startswith("KVM_CAP_")}
    asked = sorted(name for name in theirs - known if not name.removeprefix("KVM_CAP_").startswith(OTHER_ARCHITECTURES))
    newest = max(vars(kvm_cap)[name] for name in known)
    numbers = abi_facts.measure(asked, machine) if asked else []
    assert [name for name, number in zip(asked, numbers, strict=True) if number <= newest] == []

    exits = {name for name in abi_facts.macros(machine) if name.startswith("KVM_EXIT_")}
    reasons = [reason.name for reason in kvm_run.ExitReason]
    assert set(reasons) <= exits
    assert sorted(reason.value for reason in kvm_run.ExitReason) == list(range(len(reasons)))


def test_no_constant_of_userfaultfd_is_missing(machine: str) -> None:
    known = {fact.expression for fact in abi_facts.constant_facts(machine)}
    theirs = {name for name in abi_facts.macros(machine) if name.startswith(("UFFD", "_UFFDIO", "USERFAULTFD"))}
    assert "UFFD_FEATURE_RWP" in theirs
    assert theirs - known == set()


def test_userfaultfd_has_the_system_call_number_of_its_architecture(machine: str) -> None:
    assert wrong([Fact("__NR_userfaultfd", userfaultfd.NR_USERFAULTFD[machine])], machine) == []


def mutants(kind: Any) -> Iterator[Any]:
    """Make ``kind`` with each field in turn removed, doubled, and preceded by a byte, nested fields included."""
    fields: list[tuple[str, Any]] = list(kind._fields_)
    for i, (name, field) in enumerate(fields):
        before, after = fields[:i], fields[i + 1 :]
        if issubclass(kind, Structure):  # in a union such a change may make no difference
            yield mutant(kind, [*before, *after])
            yield mutant(kind, [*before, (name, field * 2), *after])
            yield mutant(kind, [*before, ("_byte", c_uint8), (name, field), *after])
        if issubclass(field, Structure | Union) and field.__name__.startswith("_"):
            yield from (mutant(kind, [*before, (name, inner), *after]) for inner in mutants(field))


def mutant(kind: Any, fields: list[tuple[str, Any]]) -> Any:
    kept = {name for name, field in fields if issubclass(field, Structure | Union)}
    nameless = [name for name in getattr(kind, "_anonymous_", ()) if name in kept]
    return type(kind.__name__, (kind.__base__,), {"_anonymous_": nameless, "_fields_": fields})


def test_the_headers_contradict_a_field_lost_added_or_resized(machine: str) -> None:
    """This tests the tests: every such change to every structure contradicts the headers."""
    kinds = abi_facts.structures(machine).values()
    cases = [(case, list(abi_facts.structure_facts(case, machine))) for kind in kinds for case in mutants(kind)]
    questions = sorted({fact.expression for _, facts in cases for fact in facts})
    answers = dict(zip(questions, abi_facts.measure(questions, machine), strict=True))
    unnoticed = [
        f"{kind.__name__}: {[name for name, *_ in kind._fields_]}"
        for kind, facts in cases
        if all(answers[fact.expression] == fact.value for fact in facts) and not abi_members.missing(kind, machine)
    ]
    assert len(cases) > 300
    assert unnoticed == []


def test_every_request_is_named_as_it_is_called() -> None:
    for info in pkgutil.iter_modules(pyvmm.uapi.__path__):
        module = importlib.import_module(f"pyvmm.uapi.{info.name}")
        for name, thing in vars(module).items():
            if isinstance(thing, Ioctl):
                assert thing.name == name
                assert thing.argument is None or thing.number >> 16 & 0x3FFF == sizeof(thing.argument)
