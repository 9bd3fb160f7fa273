# SPDX-License-Identifier: Apache-2.0
"""Invented atlases for tests of reports: a realistic one of two kernels, a hostile one, and arbitrary ones.

``python tests/unit/atlas_samples.py FILE`` writes the realistic one as JSON, to look at its reports.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st

from pyvmm.atlas.model import Atlas, Result
from pyvmm.experiment.record import Event, Evidence, Picture, Verdict

HEADINGS = {
    "fault-in": "How pages get into the guest",
    "ownership": "Who can still touch a page",
    "share": "What a share and an unshare do",
    "conversion": "What conversions do to contents",
    "private-fd": "What guest_memfd and holes in it mean",
    "lazy": "Memory that is provided late",
    "huge": "Huge pages",
    "fatal": "What is refused, and what is final",
    "teardown": "What the end leaves behind",
}

THREAD = (
    'thread, https://lore.example/kvm/1/: "once it has a page, the host handler issues a hypercall to donate the page '
    "to the guest; the hypervisor does a bunch of checks to make sure the host owns the page, and if all is fine it "
    'will unmap it from the host stage-2"; arch/arm64/kvm/mmu.c, pkvm_mem_abort()'
)

SAYS = {
    "fault-in": [
        ("empty-stage-2", "A guest starts with an empty stage 2: what it touches first faults, page by page."),
        ("locked-one-by-one", "Each page the guest touches is locked as it is donated: VmLck grows by 4 kB a page."),
        ("prefault-is-refused", "KVM_PRE_FAULT_MEMORY is refused on arm64."),
        ("order-does-not-matter", "Pages touched backwards are donated as pages touched forwards are."),
        ("reads-donate-too", "A page the guest only reads is donated as well."),
        ("exec-faults-again", "Executing from a page that was only written faults once more, to relax permissions."),
        ("contents-survive-donation", "What the host wrote before the first run, the guest reads after the donation."),
        ("limit-stops-and-goes-on", "At RLIMIT_MEMLOCK KVM_RUN fails with ENOMEM; after raising it the guest goes on."),
        ("two-vcpus-one-page", "Two vCPUs that touch one fresh page at once fault it in once, and lose no store."),
    ],
    "ownership": [
        ("host-load", "A host load of a page that the guest owns is SIGSEGV."),
        ("host-store", "A host store to a page that the guest owns is SIGSEGV, and the guest's data stay."),
        ("process-vm-readv-destroys", "process_vm_readv of a donated page reads zeros, and the page is lost."),
        ("direct-io-into-private", "O_DIRECT into a donated page is refused, or kills nobody but the caller."),
        ("fork-does-not-copy", "A forked child does not get a copy of guest memory."),
        ("ptrace-peek", "PTRACE_PEEKDATA of a donated page does not return the guest's data."),
        ("proc-mem", "/proc/self/mem does not return the guest's data."),
        ("other-guest", "A second VM over the same memfd cannot map a page the first one owns."),
    ],
    "share": [
        ("contents-are-kept", "What the guest wrote before a share, the host reads after it."),
        ("untouched-page", "A share of a page that was never touched succeeds: it is faulted in on the way."),
        ("twice-is-refused", "A second MEM_SHARE of the same page returns -3."),
        ("unshare-locks-out-again", "After MEM_UNSHARE a host load is SIGSEGV again."),
        ("host-stores-survive-unshare", "What the host wrote to a shared page, the guest reads after it has unshared."),
        ("nobody-is-told", "Upstream pKVM does not exit to the VMM on a share."),
        ("outside-any-slot", "A share outside every memory slot is a synchronous abort for the guest."),
        ("features", "The FEATURES call answers 0x1d in a protected VM."),
    ],
    "conversion": [
        (f"{policy}-{what}", f"With the policy {policy}, {says}")
        for policy in ("preserve", "zero-by-guest", "zero-by-host", "hole", "copy")
        for what, says in (
            ("to-shared", "a page that becomes shared has the contents the policy promises."),
            ("to-private", "a page that becomes private again has the contents the policy promises."),
        )
    ],
    "private-fd": [
        ("host-touch-is-sigbus", "A host touch of a guest_memfd without INIT_SHARED is SIGBUS."),
        ("hole-then-zero", "After a hole was punched the guest reads zeros, and no exit says so."),
        ("hole-splits-brain", "A hole under a donated page succeeds; guest and host see different pages from then on."),
        ("closed-fd-is-a-memory-fault", "After the fd is closed a guest access is KVM_EXIT_MEMORY_FAULT with its gpa."),
        ("hole-frees-memory", "A hole gives memory back to the host while the guest lives."),
        ("allocation-is-not-mapping", "fallocate allocates pages, but maps none in stage 2."),
        ("memory-attributes", "KVM_SET_MEMORY_ATTRIBUTES is refused on arm64."),
        ("slot-replaced-under-guest", "A deleted slot can be put back over another backing, and the guest reads that."),
    ],
    "lazy": [
        ("slot-on-demand", "Memory can be provided at the guest's first touch, and its store is kept."),
        ("uffd-missing", "userfaultfd (missing) serves a guest's first touch."),
        ("uffd-on-guest-memfd", "userfaultfd cannot be registered on a guest_memfd mapping."),
        ("madvise-populate", "MADV_POPULATE_WRITE fills the backing, and the guest's first touch still faults."),
    ],
    "huge": [
        ("one-fault-for-2m", "One fault maps 2 MiB where backing and alignment allow."),
        ("hugetlb-is-refused", "KVM_RUN over hugetlb fails with EIO."),
        ("split-on-share", "A share inside a huge page leaves the other 511 pages as they were."),
        ("dirty-log-splits", "Dirty logging maps 4 KiB only."),
    ],
    "fatal": [
        ("slot-deletion-is-refused", "Deleting a slot of a protected VM that has run is EPERM."),
        ("late-vcpu", "A vCPU made after the first run cannot run."),
        ("poison-is-final", "Once a page was taken back by force every further KVM_RUN fails with EFAULT."),
        ("abort-without-slot", "An instruction fetch outside every slot is a synchronous abort."),
        ("smccc-filter", "The SMCCC filter is refused in a protected VM with EINVAL."),
        ("registers-stay-hidden", "GET_ONE_REG of a protected vCPU that has run does not tell its registers."),
    ],
    "teardown": [
        ("zeros", "Private pages come back as zeros when the VM is gone."),
        ("shared-keeps", "A page still shared at the end keeps its contents."),
        ("locked-until-the-end", "Locked memory returns to where it was when the last descriptor is closed."),
        ("poison-once", "The end of one VM does not disturb a second one."),
        ("no-fd-left", "No descriptor, thread or mapping is left."),
    ],
}  # fmt: skip

PLACES = [
    ("none", "memfd"), ("none", "thp"), ("none", "hugetlb"), ("none", "guest_memfd"), ("emulated", "memfd"),
    ("emulated", "guest_memfd"), ("emulated", "private"), ("pkvm", "memfd"), ("pkvm", "thp"),
]  # fmt: skip

NO_PVM = "this kernel makes no protected VMs: KVM_CREATE_VM(type=0x8000_0000) is EINVAL"
NO_HUGE = "no huge pages are reserved (/proc/sys/vm/nr_hugepages is 0)"
NO_FILTER = (
    "KVM_SET_DEVICE_ATTR(vm, KVM_ARM_VM_SMCCC_FILTER): ENXIO: this kernel forwards no hypercalls to the VMM, so that "
    "pyvmm cannot answer them"
)

HOST: dict[str, bool | int | str] = {
    "kernel": "7.3.4+deb13-arm64",
    "version": "#1 SMP Debian 7.3.4-1~bpo13+1 (2026-11-02)",
    "mode": "protected",
    "machine": "aarch64",
    "cpu": "Neoverse-N1 (implementer 0x41, part 0xd0c)",
    "tcg": True,
    "pyvmm": "0.2.0",
    "page size": 4096,
    "cpus": 2,
}

FREE = 0x8100_0000


def claim_ids() -> list[str]:
    """Return the ids of all claims of the realistic atlas."""
    return [f"{group}/{name}" for group, claims in SAYS.items() for name, _ in claims]


def realistic(seed: int = 1, *, protected: bool = True, kernel: str = "7.3.4+deb13-arm64") -> Atlas:
    """Return an atlas like that of a real run. Without ``protected`` the kernel has no protected VMs."""
    results = []
    for group, claims in SAYS.items():
        for name, says in claims:
            chance = random.Random(f"{group}/{name}/{seed}")
            places = [place for place in PLACES if place[0] == "pkvm" or chance.random() < 0.55] or PLACES[:1]
            places = [place for place in places if place != ("pkvm", "thp") or group == "huge"]
            results += [_result(group, name, says, place, chance, protected) for place in places]
    times = {"date": f"2026-11-24T06:{seed % 60:02}:11+00:00", "seconds": 311.5 + seed}
    return Atlas(HOST | {"kernel": kernel, "mode": "protected" if protected else "nvhe"}, tuple(results), times)


def _result(group: str, name: str, says: str, place: tuple[str, str], chance: random.Random, protected: bool) -> Result:
    protection, backing = place
    origin = THREAD if len(name) % 2 else f"arch/arm64/kvm/mmu.c:{900 + len(says)}"
    base = Result(f"{group}/{name}", group, says, origin, protection, backing, Verdict.HOLDS)
    if protection == "pkvm" and not protected:
        return replace(base, verdict=Verdict.UNTOLD, reason=NO_PVM, times={"seconds": 0.02})
    if backing == "hugetlb":
        return replace(base, verdict=Verdict.UNTOLD, reason=NO_HUGE, times={"seconds": 0.03})
    if protection == "emulated" and group == "fatal":
        return replace(base, verdict=Verdict.UNTOLD, reason=NO_FILTER, times={"seconds": 0.04})
    if name == "two-vcpus-one-page" and protection == "emulated":
        said = 'not done after 20 s, and killed; it said: Traceback (most recent call last):\n  File "x.py", line 9'
        return replace(base, verdict=Verdict.CRASHED, reason=said, times={"seconds": 20.01})
    fails = chance.random() < (0.05 if protection == "pkvm" else 0.2)
    return replace(
        base,
        verdict=Verdict.FAILS if fails else Verdict.HOLDS,
        evidence=_evidence(chance, fails),
        pictures=_pictures(chance, protection),
        events=(events := _events(chance)),
        times={
            "seconds": round(chance.uniform(0.3, 2.5), 3),
            "ticks": {"first touch": chance.randrange(20_000, 90_000), "second touch": chance.randrange(40, 300)},
            "events": [(number + 1) * 310_000 + chance.randrange(90_000) for number in range(len(events))],
        },
    )


def _evidence(chance: random.Random, fails: bool) -> tuple[Evidence, ...]:
    pages = chance.choice([1, 4, 16])
    return (
        Evidence("the page", f"0x8100_{chance.randrange(16):x}000"),
        Evidence("pages touched", pages),
        Evidence(f"VmLck grew by {pages} pages, in kB", pages * 4 if not fails else pages * 2, pages * 4),
        Evidence("a host load faults", True, True),
        Evidence("the guest reads what it wrote", "0x0000_0000_0000_002a", "0x0000_0000_0000_002a"),
    )


def _pictures(chance: random.Random, protection: str) -> tuple[Picture, ...]:
    private, shared = (0x82, 0x83) if protection == "pkvm" else (2, 3)
    if protection == "none":
        private = shared = 1
    first, size = FREE >> 12, 0x8200_0000 >> 12
    base = [(0x8000_0000, 0x200, private), (0x8020_0000, first - 0x80200, 1)]
    touched = chance.choice([1, 4, 16])
    at = FREE + chance.randrange(8) * 0x1000

    def map_of(*middle: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        runs, here = list(base), FREE
        for gpa, pages, entry in middle:
            if gpa > here:
                runs.append((here, (gpa - here) >> 12, 1))
            runs.append((gpa, pages, entry))
            here = gpa + (pages << 12)
        return [*runs, (here, size - (here >> 12), 1)]

    rest = [(at + 4096, touched - 1, private)] * (touched > 1)
    return (
        Picture("before", map_of()),
        Picture(f"{touched} pages touched", map_of((at, touched, private))),
        Picture("the first one shared", map_of((at, 1, shared), *rest)),
    )


def _events(chance: random.Random) -> tuple[Event, ...]:
    faults, holes = chance.choice([1, 4, 8]), chance.randrange(2)
    kinds = ["slot", *["fault"] * faults, "share", "unshare", *["punch", "fault"] * holes]
    return tuple(
        Event(order, kind, 0x8000_0000 if kind == "slot" else FREE + order * 4096, 4096 if kind == "slot" else 1)
        for order, kind in enumerate(kinds)
    )


NASTY = (
    "</script><script>alert(1)</script>", "<!-- <script", "]]>", "&amp;&lt;", '" onclick="alert(1)', "' x='",
    "\x1b[31mred", "\x00\x01\ufffe", "a\nb\tc\rd", "\u202egnp.exe", "javascript:alert(1)",
    "https://a.example/?a=1&b=<2>\"'", "é 漢字 😀", "", "http://a.example/x.",
    "--><img src=x onerror=alert(1)>", "{{7*7}}", "\u2028", "x" * 300, "\ud800",
)  # fmt: skip
"""Texts that break reports which do not escape."""


def nasty() -> Atlas:
    """Return an atlas with every hostile text in every field."""
    results = [
        Result(
            f"{text}/{number}",
            text,
            text,
            text,
            text,
            text,
            list(Verdict)[number % 4],
            text,
            (Evidence(text, text), Evidence(text, text, text), Evidence(text, text, text + "!")),
            (Picture(text, [(0, 1, 1), (4096, 3, 0x82)]), Picture(text, [(0, 1, 3), (4096, 3, 255)])),
            (Event(0, text, 0, 1), Event(1, text, 1 << 63, 1 << 40)),
            {"seconds": 0.1, "ticks": {text: 3}, "events": [1, 2], text: text},
        )
        for number, text in enumerate(NASTY)
    ]
    host: dict[str, bool | int | str] = {**{text: text for text in NASTY}, "kernel": NASTY[0]}
    return Atlas(host, tuple(results), {"date": NASTY[0], "x": NASTY[3]})


arbitrary = settings(max_examples=60)
"""For tests over arbitrary atlases."""

# Each surrogate has a separate text: JSON would turn two adjacent surrogates into one character.
texts = st.one_of(st.text(max_size=20), st.sampled_from(NASTY))
names = st.one_of(texts, st.sampled_from(["none", "pkvm", "memfd", "guest_memfd", "share", "share/a"]))
values = st.one_of(st.booleans(), st.integers(-(2**70), 2**70), texts)
evidences = st.builds(Evidence, texts, values, st.none() | values)
gpas = st.integers(0, 1 << 20).map(lambda page: page << 12)
runs = st.lists(st.tuples(gpas, st.integers(1, 4096), st.integers(0, 255)), max_size=4)
pictures = st.builds(Picture, texts, runs)
events = st.builds(Event, st.integers(0, 99), names, st.integers(0, 2**64 - 1), st.integers(0, 2**40))
times = st.fixed_dictionaries(
    {},
    optional={
        "seconds": st.floats(0, 1000), "ticks": st.dictionaries(texts, st.integers(), max_size=3),
        "events": st.lists(st.integers(0, 2**62), max_size=3), "other": texts,
    },
)  # fmt: skip
results = st.builds(
    Result, names, names, texts, texts, names, names, st.sampled_from(Verdict), texts,
    st.lists(evidences, max_size=4).map(tuple), st.lists(pictures, max_size=2).map(tuple),
    st.lists(events, max_size=3).map(tuple), times,
)  # fmt: skip
atlases = st.builds(
    Atlas, st.dictionaries(names, values, max_size=4),
    st.lists(results, max_size=6, unique_by=lambda result: result.key).map(tuple),
    st.fixed_dictionaries({}, optional={"date": texts, "seconds": st.floats(0, 1e6)}),
)  # fmt: skip


if __name__ == "__main__":
    import json

    Path(sys.argv[1]).write_text(json.dumps(realistic().to_json()))
