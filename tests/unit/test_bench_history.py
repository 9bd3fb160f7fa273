# SPDX-License-Identifier: Apache-2.0
"""A guest gets pages that a protected guest had before, unless its point is of the first guest after a boot."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm.bench import history
from pyvmm.bench.case import all_cases
from pyvmm.bench.collect import Plan
from pyvmm.bench.measure import Bench, Unavailable
from pyvmm.errors import UsageError
from pyvmm.memory.address import MIB
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes for which the host was settled; no guest starts."""
    sizes: list[int] = []

    def settle(size: int, *, seconds: float) -> str:
        assert seconds > 0
        sizes.append(size)
        return "ENOMEM" if size > 8 * MIB else ""

    monkeypatch.setattr("pyvmm.bench.measure.settle", settle)
    monkeypatch.setattr("pyvmm.bench.measure.Experiment", lambda *_, **options: options["memory"])
    return sizes


def bench(new: bool = False, **point: Any) -> Bench:
    return Bench("fault", {"protection": "pkvm", **point}, new=new)


def test_the_host_is_settled_once_for_guests_of_the_same_size(settled: list[int]) -> None:
    point = bench(history="settled")
    for room in (0, MIB, MIB, 0, 2 * MIB):
        point.guest(room=room)
    assert settled == [MIB, 2 * MIB]
    bench(protection="none").guest(room=MIB)
    assert settled[2:] == [MIB]
    point.keep("touch", [[1.0]])
    assert point.series[0].notes == {}


def test_a_series_says_where_the_host_could_not_be_settled(settled: list[int]) -> None:
    point = bench()
    point.guest(room=16 * MIB)
    point.keep("touch", [[1.0]])
    assert settled == [16 * MIB]
    assert point.series[0].notes == {"not settled": "ENOMEM"}


def test_the_first_guest_after_a_boot_gets_pages_as_they_are(settled: list[int]) -> None:
    bench(new=True, history="first").guest(room=MIB)
    with pytest.raises(Unavailable, match="not the first protected VM since the host's boot"):
        bench(history="first").guest(room=MIB)
    assert settled == []


def test_only_a_protected_guest_is_first_and_it_is_measured_first() -> None:
    steps = Plan(("fault",), {"protection": ["pkvm"], "history": ["settled", "first"]}).steps()
    assert [step.point["history"] for step in steps] == ["first", "settled"]
    assert Plan(("exit", "fault")).steps()[0].point["history"] == "first"
    with pytest.raises(UsageError, match="only a protected guest is the first"):
        all_cases()["fault"].check({"protection": "none", "history": "first"})


@pytest.mark.parametrize(("taint", "new"), [(0, True), (8192, True), (64, False), (8192 + 64, False)])
def test_the_kernel_tells_by_its_taint_whether_a_protected_vm_was_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, taint: int, new: bool
) -> None:
    file = tmp_path / "tainted"
    file.write_text(f"{taint}\n")
    monkeypatch.setattr(history, "TAINTED", file)
    assert history.is_new() is new


@pytest.mark.parametrize(
    ("protects", "free", "touched"), [(True, 1 << 30, 6 * MIB), (True, 8 * MIB, 4 * MIB), (False, 1 << 30, 0)]
)
def test_a_protected_guest_touches_twice_the_memory_or_half_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch, protects: bool, free: int, touched: int
) -> None:
    asked: list[int] = []

    class Guest:
        def __init__(self, protection: Protection, *_: object, memory: int) -> None:
            assert protection is Protection.PKVM
            assert memory * MIB >= touched
            self.guest = SimpleNamespace(start_touch=lambda _, pages, **__: asked.append(pages * HOST_PAGE))

        def __enter__(self) -> Guest:
            return self

        def __exit__(self, *_: object) -> None: ...

        def page(self, pages: int) -> int:
            return pages

        def failed(self, *_: object, timeout: float) -> None: ...

    class System(Guest):
        def __init__(self) -> None: ...

        def supports_protected(self) -> bool:
            return protects

    monkeypatch.setattr(history, "Experiment", Guest)
    monkeypatch.setattr(history, "System", SimpleNamespace(open=System))
    monkeypatch.setattr(history, "_free", lambda: free)
    assert history.settle(3 * MIB, seconds=1.0) == ""
    assert asked == [touched] * (touched > 0)


def test_the_free_memory_is_what_the_kernel_says_is_available() -> None:
    assert MIB < history._free() < 1 << 50
