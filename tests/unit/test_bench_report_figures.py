# SPDX-License-Identifier: Apache-2.0
"""The figures: all data is drawn with titles and labels, and the files are the same each time."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import cast
from xml.etree import ElementTree

import pytest

from pyvmm.bench.model import BenchError, Point, Run, Series
from pyvmm.bench.report import figures, groups
from pyvmm.labenv import TCG_NOTE
from tests.unit import bench_samples as samples

np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")

from pyvmm.bench.report import heat, plot  # noqa: E402 - they need modules that may be missing

REALISTIC = samples.realistic(32)


def drawn(run: Run, *, relative: bool = True) -> list[plot.Plot]:
    return [each for section in groups.sections(run) for each in figures.pictures(section, relative=relative)]


def names(*some: Series) -> list[str]:
    return [picture.name for picture in drawn(samples.run(*some))]


def words(document: str) -> str:
    return " ".join(element.text or "" for element in ElementTree.fromstring(document).iter() if element.text)


@pytest.fixture(scope="module")
def documents() -> dict[plot.Plot, str]:
    return {picture: plot.svg(picture) for picture in drawn(REALISTIC)}


def test_every_series_has_a_figure() -> None:
    found = {picture.name for picture in drawn(REALISTIC)}
    assert {
        "fault-touch-by-cpus",
        "fault-touch-distributions",
        "fault-touch-shares",
        "fault-touch-pages-pkvm-base",
        "teardown-close-by-size",
        "split-stacked",
        "peer-peers-exit",
    } <= found
    for section in groups.sections(REALISTIC):
        assert any(name.startswith(section.case) for name in found)


def test_every_figure_has_its_subject_its_counts_and_the_warning_about_emulation(
    documents: dict[plot.Plot, str],
) -> None:
    for picture, document in documents.items():
        said = words(document)
        assert picture.title in said
        assert TCG_NOTE in said
        assert re.search(r"n=\d", said), picture.name
        assert re.search(r"\b(µs|ms|ns|MiB|count)\b", said), picture.name


def test_figures_of_hardware_are_not_called_relative() -> None:
    (picture, *_) = drawn(REALISTIC, relative=False)
    assert TCG_NOTE not in plot.svg(picture)


def test_figures_are_the_same_each_time_and_load_nothing_from_elsewhere(documents: dict[plot.Plot, str]) -> None:
    for picture in list(documents)[:3]:
        assert plot.svg(picture) == documents[picture]
    for document in documents.values():
        assert set(re.findall(r'https?://[^"\s<]*', document)) <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
            "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd",
        }
        assert "<metadata" not in document


def test_each_figure_is_written_in_two_formats_under_safe_names(tmp_path: Path) -> None:
    hostile = samples.hostile()
    few = hostile.with_series(each for each in hostile.series[:4] if each.case != "fault")
    written = figures.save(few, tmp_path / "new" / "figures")
    assert sorted(written) == sorted((tmp_path / "new" / "figures").iterdir())
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,90}\.(svg|png)", path.name) for path in written)
    assert len({path.stem for path in written}) * 2 == len(written)
    assert all(path.read_bytes().startswith((b"<?xml", b"\x89PNG")) for path in written)


def test_the_error_names_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BenchError, match=r"figures cannot be written to .*file: "):
        figures.save(REALISTIC, tmp_path / "file")


# ---- which data is drawn how ------------------------------------------------------------------------------------


def line_names(group: groups.Group, axis: str) -> dict[str, list[float]]:
    place = figures._count if axis == "cpus" else figures._mebibytes
    return {name: [at for at, _ in points] for name, points in figures._lines(group, axis, place)}


def test_a_line_joins_points_that_differ_only_along_the_axis() -> None:
    points = [*(("none", cpus, "x") for cpus in (1, 4, 2)), ("pkvm", 1, "x"), ("pkvm", 2, "x"), ("pkvm", 1, "y")]
    some = [samples.series([1.0], point=dict(zip(("p", "cpus", "o"), point, strict=True))) for point in points]
    run = samples.run(*some)
    (section,) = groups.sections(run)
    assert line_names(section.groups[0], "cpus") == {"none": [1, 2, 4], "pkvm": [1, 2]}


@pytest.mark.parametrize(
    ("value", "mebibytes"),
    [("16M", 16), ("1G", 1024), ("64MiB", 64), (4, 4), ("512K", 0.5), ("big", None), (True, None), (0, None)],
)
def test_sizes_are_parsed_as_users_type_them(value: int | str, mebibytes: float | None) -> None:
    assert figures._mebibytes(value) == mebibytes


def test_one_point_does_not_make_a_line() -> None:
    assert names(samples.series([1.0, 2.0], point={"cpus": 2})) == ["fault-touch-distributions"]


def test_parts_are_stacked_beside_the_whole_with_their_sum() -> None:
    shares = {"whole": 100.0, "EL2": 40.0, "account and pin": 30.0, "exit and entry": 25.0}
    some = [samples.series([value] * 9, case="split", metric=metric) for metric, value in shares.items()]
    (picture, *_) = drawn(samples.run(*some))
    said = words(plot.svg(picture))
    assert picture.name == "split-stacked"
    assert "sum 95.00: 95.0 %" in said
    assert all(part in said for part in shares)
    assert "allocation" not in said


def test_peers_are_drawn_as_multiples_of_pyvmm() -> None:
    some = [
        samples.series([cost] * 9, case="peer", metric="exit", per="exit", point={"beside": beside, "peer": peer})
        for beside, peer, cost in [("a", "pyvmm", 200), ("a", "a", 500), ("b", "pyvmm", 100), ("b", "b", 50)]
    ]
    said = words(plot.svg(drawn(samples.run(*some))[0]))
    for each in ("500, 2.50 times ours", "50, 0.50 times ours", "pyvmm beside a", "pyvmm beside b"):
        assert each in said


def test_pages_are_drawn_if_every_touch_of_the_last_round_has_a_place() -> None:
    made = samples.series([1.0, 2.0, 4.0, 8.0], rounds=[2, 2], warmup=2, places=(0, 0, 7, 9), began=(0, 0, 0, 4))
    assert "fault-touch-pages-all" in names(made)
    assert "fault-touch-pages-all" not in names(replace(made, places=(7,)))
    assert "fault-touch-pages-all" not in names(replace(made, places=(), began=()))
    assert "fault-touch-pages-all" not in names(replace(made, began=cast("tuple[float, ...]", (0, 0, 0, "x"))))
    assert "fault-touch-pages-all" not in names(replace(made, began=(0, 0, 0, float("nan"))))


def test_every_protection_has_pictures_even_if_some_must_be_left_out() -> None:
    some = [
        samples.series([1.0], point={"protection": protection, "at": at}, places=(0,), began=(0.0,))
        for protection in ("none", "emulated", "pkvm")
        for at in range(9)
    ]
    found = [name for name in names(*some) if "-pages-" in name]
    assert len(found) == figures.HEATS
    assert {name.split("-")[3] for name in found} == {"none", "emulated", "pkvm"}


def test_cells_show_each_touch_from_begin_to_end_and_the_costliest_on_overlap() -> None:
    began, took = np.array([0.0, 80.0, 0.0]), np.array([80.0, 79.0, 1.0])
    cells = heat._cells(began, took, np.array([0.0, 1.0, 1.0]), np.array([4, 1, 2]))
    assert cells.shape == (2, 160)
    assert cells[0].tolist() == [4] * 81 + [-1] * 79
    assert cells[1].tolist() == [2] * 2 + [-1] * 78 + [1] * 80


def test_classes_are_multiples_of_the_median() -> None:
    assert heat.class_edges(np.array([10.0, 20.0, 1000.0])) == [16, 25, 40, 100]
    assert heat.class_edges(np.zeros(3)) == []


def test_a_figure_has_a_bounded_size_however_long_its_series() -> None:
    rng = np.random.default_rng(1)
    count = 65_536
    long = samples.series(
        rng.lognormal(7, 1, count),
        rounds=[count],
        places=tuple(range(count)),
        began=tuple(float(at) for at in range(count)),
    )
    other = replace(long, point={"protection": "pkvm"})
    for picture in drawn(samples.run(long, other)):
        assert len(plot.svg(picture)) < 150_000, picture.name


@pytest.mark.parametrize("values", [[5.0] * 30, [0.0] * 30, [-1.0, 1.0] * 15, [1e-9, 1e9] * 15, [7.0]])
def test_odd_values_are_drawn_without_a_warning(values: list[float], recwarn: pytest.WarningsRecorder) -> None:
    point: list[Point] = [{"cpus": cpus, "protection": "none"} for cpus in (1, 2)]
    some = [samples.series(values, point=each, places=range(len(values)), began=[0.0] * len(values)) for each in point]
    some += [replace(each, case="peer", point={"peer": each.point["cpus"]}) for each in some]
    some += [samples.series(values, case="split", metric=metric) for metric in ("whole", "EL2")]
    for picture in drawn(samples.run(*some)):
        plot.svg(picture)
    assert [str(each.message) for each in recwarn] == []
