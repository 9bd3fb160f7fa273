# SPDX-License-Identifier: Apache-2.0
"""The table of hosts by protection on the page about hosts."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm.errors import PyvmmError
from pyvmm.lab import Completed
from pyvmm.protection import PROTECTIONS
from tests import matrix


def test_the_page_has_each_host_and_no_empty_cell() -> None:
    written = matrix.written()
    assert list(written) == [matrix.title(name) for name in matrix.HOSTS]
    for cells in written.values():
        assert list(cells) == list(PROTECTIONS)
        assert all(cell == matrix.RUNS or len(cell.split()) > 3 for cell in cells.values()), cells
    assert matrix.NOT_TRIED not in str(written)


def test_what_was_seen_is_written_into_the_page_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "table"
    page.write_text(f"before\n{matrix.BEGIN}old\n{matrix.END}after\n")
    monkeypatch.setattr(matrix, "PAGE", page)
    cells = dict.fromkeys(PROTECTIONS, "runs") | {"pkvm": "a | b: no such thing"}
    matrix.write(matrix.table({"own": matrix.Row("7.3.4", cells)}))
    assert page.read_text().startswith(f"before\n{matrix.BEGIN}| host |")
    assert "| runs | runs | no: 1 |" in page.read_text()
    assert page.read_text().endswith(f"{matrix.END}after\n")
    assert matrix.written() == {matrix.title("own"): cells}


def test_a_host_or_one_of_its_cells_is_named() -> None:
    assert matrix.wanted(["own", "nvhe/pkvm", "nvhe/none"]) == {"own": list(PROTECTIONS), "nvhe": ["pkvm", "none"]}
    assert list(matrix.wanted([])) == list(matrix.HOSTS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nvme"], "no host 'nvme'; did you mean nvhe?"),
        (["own/tdx"], "no protection 'tdx'; none, emulated, pkvm"),
        (["--write", "own"], "--write is for the whole table"),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_ones(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        matrix.main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("KVM_CREATE_VM(kvm=4, type=0x8000_0000): EINVAL: no\n  hint: more\n", "KVM_CREATE_VM: EINVAL: no"),
        (" \n", "it ended without a word"),
    ],
)
def test_a_reason_is_one_line_without_the_arguments_of_a_call(text: str, said: str) -> None:
    assert matrix._sentence(text) == said


def test_a_guest_that_holds_up_its_lab_loses_no_other_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(argv: list[str], **_: Any) -> Completed:
        if "emulated" in argv:
            raise PyvmmError("the command did not end")
        return Completed(0, b"", b"1 shared, 0 refused")

    lab = SimpleNamespace(capture=capture)
    image = SimpleNamespace(manifest=SimpleNamespace(release="7.3"))
    monkeypatch.setattr(matrix, "build_image", lambda _: image)
    monkeypatch.setattr(matrix, "Lab", lambda _options, **_: nullcontext(lab))
    row = matrix.seen(matrix.HOSTS["nvhe"], ["none", "emulated", "pkvm"])
    assert row.cells == {"none": matrix.RUNS, "emulated": "the command did not end", "pkvm": matrix.RUNS}
    assert row.release == "7.3"
