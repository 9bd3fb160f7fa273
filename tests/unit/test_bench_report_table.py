# SPDX-License-Identifier: Apache-2.0
"""The tables in the terminal: what varies, what it cost, what is unavailable, within the terminal's width."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pyvmm.bench import peers
from pyvmm.bench.report import groups, html, table
from pyvmm.labenv import TCG_NOTE
from pyvmm.reports.look import Look
from tests.unit import bench_samples as samples

pytest.importorskip("numpy")

WIDE = Look(120)


def rows(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_a_row_has_every_statistic_that_its_values_support() -> None:
    made = samples.series(range(1, 1001), point={"protection": "pkvm"}, rounds=[250] * 4)
    (row,) = rows(table.text(samples.run(made), WIDE), "1,000/4")
    assert row.split() == ["1,000/4", "500.5", "~[167,", "834]", "900.1", "990.0", "999.0", "1,000", "0"]


def test_statistics_that_the_values_do_not_support_are_dashes() -> None:
    (row,) = rows(table.text(samples.run(samples.series([5.0])), WIDE), " 1 ")
    assert row.split() == ["1", "5", "-", "-", "-", "-", "5", "0"]


def test_columns_are_the_axes_that_vary_and_the_other_axes_are_printed_once() -> None:
    some = [
        samples.series([1.0, 2.0], point={"protection": protection, "backing": "memfd"})
        for protection in ("none", "pkvm")
    ]
    said = table.text(samples.run(*some), WIDE)
    assert len(rows(said, "memfd")) == 1
    (head,) = rows(said, "median", "p99.9")
    assert head.split()[0] == "protection"
    assert "backing" not in head


def test_a_row_names_its_difference_from_the_base_if_many_axes_vary() -> None:
    base = {"protection": "none", "state": "cold", "access": "write", "order": "sequential"}
    stars = [{}, {"state": "mapped"}, {"access": "read"}, {"order": "random"}]
    some = [
        samples.series([1.0], point={**base, "protection": protection, **star})
        for protection in ("none", "pkvm")
        for star in stars
    ]
    said = table.text(samples.run(*some), WIDE)
    assert rows(said, "base: state=cold access=write order=sequential")
    assert [row.split()[:2] for row in rows(said, "pkvm")] == [
        ["pkvm", what] for what in ("(base)", "state=mapped", "access=read", "order=random")
    ]


def test_series_of_different_clocks_and_units_are_not_put_in_one_table() -> None:
    made = samples.series([1.0])
    some = [made, replace(made, clock="el2"), replace(made, unit="count"), replace(made, per="exit")]
    said = table.text(samples.run(*some), WIDE)
    assert len(rows(said, "median", "p99.9")) == 4
    assert rows(said, "touch per page, ns, the hypervisor's trace")


def test_series_measured_in_turns_are_one_row() -> None:
    turns = [
        samples.series([9.0, value, value], rounds=[1, 1, 1], warmup=1, places=(0, 0, 5), began=(0, 0, 0))
        for value in (1.0, 2.0, 3.0)
    ]
    run = samples.run(*turns)
    (row,) = rows(table.text(run, WIDE), "6/6")
    assert row.split()[1] == "2"
    (section,) = groups.sections(run)
    assert section.groups[0].rows[0].series.places == (5,)


def test_pyvmms_row_beside_a_peer_has_the_ratio_whatever_the_width() -> None:
    turns = [[10.0], [30.0], [33.0]], [[10.0], [20.0], [22.0]]
    run = samples.run(
        samples.series([1.0]),
        *peers.pair("qemu", {"what": "store"}, "exit", *turns, clocks=("guest", "guest"), per="exit"),
    )
    for width in (60, 120):
        said = table.text(run, Look(width))
        plain, beside = rows(said, " n ", "median")
        assert ("ratio" in plain, "ratio" in beside) == (False, True)
        assert [row.split()[:2] for row in rows(said, "2/2")] == [["qemu", "-"], ["pyvmm", "1.500"]]
        assert "; ratio: pyvmm's to that of what it is beside" in " ".join(said.split())
    assert html.render(run).count('<th scope="col">ratio</th>') == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, "1.5", None])
def test_a_note_that_is_not_a_ratio_is_not_shown_as_one(value: float | str | None) -> None:
    made = samples.series([1.0], case="peer", point={"beside": "qemu"}, notes={"ratio to qemu": value})
    assert "ratio" not in table.text(samples.run(made), WIDE)


def test_a_run_without_peers_shows_no_ratios() -> None:
    assert "ratio" not in table.text(samples.run(samples.series([1.0])), WIDE)


@pytest.mark.parametrize("tcg", [True, False, None])
def test_every_table_of_a_run_under_tcg_or_unknown_warns_that_it_is_relative(tcg: bool | None) -> None:
    environment = {**samples.ENVIRONMENT, "tcg": tcg}
    said = table.text(samples.run(samples.series([1.0]), environment=environment), WIDE)
    assert len(rows(said, TCG_NOTE)) == (0 if tcg is False else 2)


def test_each_reason_is_printed_once() -> None:
    some = [samples.series([], unavailable="no EL2 trace", point={"at": at}) for at in range(5)]
    said = table.text(samples.run(*some), WIDE)
    assert rows(said, "not available: no EL2 trace")
    assert rows(said, "at=0; at=1; at=2 and 2 more")
    assert not rows(said, "median", "p99.9")


def test_the_table_says_if_a_run_was_cut_off() -> None:
    assert "cut off" in table.text(replace(samples.run(samples.series([1.0])), end=None))


def test_an_empty_run_prints_no_table() -> None:
    assert "nothing was measured" in table.text(samples.run())


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_narrow_table_loses_columns_and_not_the_median(width: int) -> None:
    said = table.text(samples.realistic(8), Look(width))
    assert max(map(len, said.splitlines())) <= width
    assert all("median" in head for head in rows(said, " n "))


def test_foreign_text_cannot_control_the_terminal() -> None:
    said = table.text(samples.hostile(), Look(100, colours=False))
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert "\\x1b[31mred" in said


def test_ascii_output_stays_ascii_and_legible() -> None:
    said = table.text(samples.realistic(8), Look(100, ascii=True))
    assert said.isascii()
    assert rows(said, ", us, ")


@pytest.mark.parametrize(
    ("unit", "middle", "shown"),
    [
        ("ns", 12.34567, "ns 12.35"),
        ("ns", 4321.0, "µs 4.321"),
        ("ns", 5e9, "s 5.000"),
        ("instructions", 834.0, "instructions 834"),
        ("instructions", 54_321.0, "instructions 54,321"),
        ("instructions", 543_210.0, "thousand instructions 543.2"),
        ("bytes", 3 * 2**20, "MiB 3.000"),
        ("count", 0.0, "count 0"),
        ("parsec", 0.00123456, "parsec 0.001235"),
        ("ns", -4321.0, "µs -4.321"),
    ],
)
def test_numbers_have_four_digits_in_a_suitable_unit(unit: str, middle: float, shown: str) -> None:
    scale = groups.scale_of(unit, [middle])
    assert f"{scale.unit} {scale.show(middle)}" == shown
