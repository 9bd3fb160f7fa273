# SPDX-License-Identifier: Apache-2.0
"""The differences of two atlases: properties of the kernel count, those of a run do not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pyvmm.atlas.model import Atlas, Result
from pyvmm.atlas.report import diff
from pyvmm.atlas.report.diff import Line, compare
from pyvmm.experiment.record import Event, Evidence, Picture, Verdict
from pyvmm.reports.look import Look
from tests.unit import atlas_samples as samples

HOLDS, FAILS, UNTOLD, CRASHED = Verdict
NO_PVM = "this kernel makes no protected VMs"


def result(
    name: str = "share/kept",
    protection: str = "pkvm",
    backing: str = "memfd",
    verdict: Verdict = HOLDS,
    reason: str = "",
    **more: Any,
) -> Result:
    group = name.partition("/")[0]
    return Result(name, group, "It is kept.", "thread", protection, backing, verdict, reason, **more)


def atlas(*results: Result, **host: Any) -> Atlas:
    return Atlas(host, results)


def said(a: Atlas, b: Atlas, **options: Any) -> list[str]:
    return diff.render(compare(a, b), **options).splitlines()


# ---- what is compared --------------------------------------------------------------------------------------------


@samples.arbitrary
@given(samples.atlases)
def test_an_atlas_equals_itself(some: Atlas) -> None:
    again = Atlas.from_json(json.loads(json.dumps(some.to_json())))
    found = compare(some, again)
    assert found.same
    assert found.host == {}
    assert found.equal == len(some.results)
    assert diff.render(found).splitlines()[-1].startswith("The same in both: ")


@samples.arbitrary
@given(samples.atlases, samples.atlases, st.data())
def test_a_diff_finds_the_same_differences_in_either_direction(a: Atlas, b: Atlas, data: st.DataObject) -> None:
    # Some results are in both, changed or not.
    if a.results:
        shared = data.draw(st.lists(st.sampled_from(a.results), max_size=3, unique_by=lambda each: each.key))
        kept = [each for each in b.results if each.key not in {one.key for one in shared}]
        verdicts = data.draw(st.lists(st.sampled_from(Verdict), min_size=len(shared), max_size=len(shared)))
        b = replace(b, results=(*kept, *(replace(one, verdict=v) for one, v in zip(shared, verdicts, strict=True))))
    there, back = compare(a, b), compare(b, a)
    assert there.same is back.same
    assert there.host == {field: (one, other) for field, (other, one) in back.host.items()}
    assert (there.only_a, there.only_b, there.equal) == (back.only_b, back.only_a, back.equal)
    for ours, theirs in ((there.verdicts, back.verdicts), (there.evidence, back.evidence)):
        assert {(change.a.key, change.a.verdict, change.b.verdict) for change in ours} == {
            (change.a.key, change.b.verdict, change.a.verdict) for change in theirs
        }
        assert sum(len(change.lines) for change in ours) == sum(len(change.lines) for change in theirs)


@samples.arbitrary
@given(samples.atlases, samples.atlases, st.booleans())
def test_a_diff_counts_every_result_once_and_can_print_everything(a: Atlas, b: Atlas, verbose: bool) -> None:
    found = compare(a, b)
    both = len({each.key for each in a.results} & {each.key for each in b.results})
    assert len(found.verdicts) + len(found.evidence) + found.equal == both
    assert len(found.only_a) + both == len(a.results)
    assert len(found.only_b) + both == len(b.results)
    text = diff.render(found, Look(ascii=True), verbose=verbose)
    assert text.isascii()
    assert all(each.isprintable() or each == "\n" for each in text)
    plain = diff.to_json(found)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["same"] is found.same


def test_a_diff_does_not_compare_times() -> None:
    a = samples.realistic()
    b = Atlas(a.host, tuple(replace(one, times={"seconds": 99.0}) for one in a.results), {"date": "another"})
    assert compare(a, b).same


def test_a_diff_does_not_compare_the_texts_of_claims() -> None:
    assert compare(atlas(result()), atlas(replace(result(), says="Other words.", origin="elsewhere"))).same


def test_hosts_may_differ_though_their_claims_are_the_same() -> None:
    found = compare(atlas(result(), kernel="6.12", cpus=2), atlas(result(), kernel="7.3", cpus=2, page=4096))
    assert found.same
    assert found.host == {"kernel": ("6.12", "7.3"), "page": (None, 4096)}


def test_a_diff_compares_evidence_by_name() -> None:
    a = result(evidence=(Evidence("n", 1, 1), Evidence("page", "0x1"), Evidence("twice", 1), Evidence("twice", 2)))
    b = result(evidence=(Evidence("twice", 1), Evidence("n", 2, 1), Evidence("twice", 3), Evidence("new", True)))
    (change,) = compare(atlas(a), atlas(b)).evidence
    assert change.lines == (
        Line("n", "1", "2 (wanted: 1)"),
        Line("page", "0x1", None),
        Line("twice", "2", "3"),
        Line("new", None, "yes"),
    )


def test_a_diff_distinguishes_true_from_one() -> None:
    a, b = result(evidence=(Evidence("n", True),)), result(evidence=(Evidence("n", 1),))
    assert not compare(atlas(a), atlas(b)).same


def test_a_diff_compares_reasons_and_page_maps_but_not_times_of_events() -> None:
    a = result(reason="a", pictures=(Picture("before", [(0, 1, 1)]),), events=(Event(0, "fault", 0x1000, 1),))
    b = result(reason="b", pictures=(Picture("before", [(0, 1, 2)]),), events=())
    (change,) = compare(atlas(a), atlas(b)).evidence
    assert change.lines == (
        Line("reason", "a", "b"),
        Line("page map: before", "1 pages at 0x0: 0x1", "1 pages at 0x0: 0x2"),
    )


# ---- how it is printed -------------------------------------------------------------------------------------------


def test_a_different_verdict_is_printed_with_its_group_and_place() -> None:
    a = atlas(
        result("share/kept"),
        result("fault-in/one", verdict=UNTOLD, reason=NO_PVM),
        kernel="6.12.117",
        mode="protected",
        tcg=True,
    )
    b = atlas(result("share/kept"), result("fault-in/one"), kernel="7.3.4", mode="protected", tcg=True)
    assert said(a, b) == [
        "A: 6.12.117 protected (qemu tcg)    B: 7.3.4 protected (qemu tcg)",
        "fault-in",
        "  one   pkvm/memfd   cannot be told → holds",
        "         A: this kernel makes no protected VMs",
        "1 verdict differs, 1 is the same.",
    ]


def test_the_two_hosts_are_printed_below_each_other_if_they_do_not_fit_side_by_side() -> None:
    a, b = atlas(kernel="6.12.117-" + "x" * 40), atlas(kernel="7.3.4")
    assert said(a, b)[:2] == ["A: 6.12.117-" + "x" * 40, "B: 7.3.4"] or len(said(a, b)[0]) <= 80
    assert said(a, b, look=Look(40))[:2] == ["A: 6.12.117-" + "x" * 40, "B: 7.3.4"]


def test_the_text_says_that_hosts_of_the_same_name_differ() -> None:
    a, b = atlas(kernel="6.12", cpus=2), atlas(kernel="7.3", cpus=4, page=4096)
    assert said(a, b)[1:-1] == ["   cpus: 2 → 4", "   page: nothing → 4096"]
    assert "   kernel: 6.12 → 7.3" in said(a, b, verbose=True)


def test_different_evidence_is_printed_under_the_verdict() -> None:
    a = atlas(result(evidence=(Evidence("kB locked", 64, 64), Evidence("same", 1))))
    b = atlas(result(evidence=(Evidence("kB locked", 128, 128), Evidence("same", 1))))
    assert said(a, b)[1:] == [
        "share",
        "  kept   pkvm/memfd   holds, but:",
        "         kB locked: 64 → 128",
        "1 result has other evidence.",
    ]


def test_a_claim_is_printed_once_for_all_its_places() -> None:
    a = atlas(result(verdict=FAILS), result(backing="thp", verdict=FAILS))
    b = atlas(result(), result(backing="thp"))
    assert said(a, b)[1:-1] == [
        "share",
        "  kept   pkvm/memfd   does not hold → holds",
        "         pkvm/thp     does not hold → holds",
    ]


def test_groups_and_claims_are_printed_in_the_order_of_the_runs() -> None:
    a = atlas(*(result(f"{each}/x", verdict=FAILS) for each in ("share", "lazy", "huge")))
    b = atlas(*(result(f"{each}/x") for each in ("huge", "fatal", "share", "lazy")))
    assert [line for line in said(a, b) if line in samples.SAYS] == ["share", "lazy", "huge", "fatal"]


def many(number: int, verdict: Verdict, reason: str = "") -> list[Result]:
    return [result(f"share/c{each}", verdict=verdict, reason=reason) for each in range(number)]


def test_many_differences_with_the_same_reason_are_one_line() -> None:
    a, b = atlas(*many(9, UNTOLD, NO_PVM), result("share/z")), atlas(*many(9, HOLDS), result("share/z", verdict=FAILS))
    assert said(a, b)[1:] == [
        "9 claims in pkvm: cannot be told → holds",
        "         A: this kernel makes no protected VMs",
        "share",
        "  z   pkvm/memfd   holds → does not hold",
        "10 verdicts differ.",
    ]


def test_verbose_prints_every_difference() -> None:
    a, b = atlas(*many(9, UNTOLD, NO_PVM)), atlas(*many(9, HOLDS))
    lines = said(a, b, verbose=True)
    assert sum("cannot be told → holds" in line for line in lines) == 9
    assert sum(NO_PVM in line for line in lines) == 9


def test_few_differences_with_the_same_reason_are_listed_with_the_reason_once() -> None:
    lines = said(atlas(*many(3, UNTOLD, NO_PVM)), atlas(*many(3, HOLDS)))
    assert sum("cannot be told → holds" in line for line in lines) == 3
    assert sum(NO_PVM in line for line in lines) == 1


def test_many_differences_without_a_reason_are_listed() -> None:
    assert sum("holds → does not hold" in line for line in said(atlas(*many(9, HOLDS)), atlas(*many(9, FAILS)))) == 9


def test_many_changed_reasons_under_the_same_verdict_are_one_line() -> None:
    assert said(atlas(*many(9, UNTOLD, "old reason")), atlas(*many(9, UNTOLD, "new reason")))[1:] == [
        "9 claims in pkvm: cannot be told",
        "         A: old reason",
        "         B: new reason",
        "9 results have other evidence.",
    ]


def test_claims_of_only_one_atlas_are_printed_and_many_of_a_kind_are_folded() -> None:
    a = atlas(result("share/kept"), result("share/old"))
    b = atlas(result("share/kept"), *many(2, HOLDS), *(result(f"huge/c{each}", backing="thp") for each in range(5)))
    assert said(a, b)[1:] == [
        "5 claims in pkvm/thp, where only B was run",
        "share",
        "  old   pkvm/memfd   only in A: holds",
        "  c0    pkvm/memfd   only in B: holds",
        "  c1    pkvm/memfd   only in B: holds",
        "1 is only in A, 7 are only in B, 1 is the same.",
    ]


def test_different_page_maps_and_events_are_only_counted_unless_verbose() -> None:
    a = atlas(result(evidence=(Evidence("n", 1),), pictures=(Picture("before", [(0, 1, 1)]),)))
    b = atlas(result(evidence=(Evidence("n", 1),), pictures=(Picture("before", [(0, 1, 2)]),)))
    assert said(a, b)[3] == "         differing: 1 page map"
    assert "         page map: before: 1 pages at 0x0: 0x1 → 1 pages at 0x0: 0x2" in said(a, b, verbose=True)


def test_long_values_are_printed_from_where_they_differ() -> None:
    a, b = (result(evidence=(Evidence("n", "w " * 60 + each),)) for each in "ab")
    assert said(atlas(a), atlas(b))[3] == "         n: …a → …b"


def test_two_kernels_differ_in_the_results_that_depend_on_protection() -> None:
    a, b = samples.realistic(protected=False, kernel="6.12.117"), samples.realistic(kernel="7.3.4")
    lines = said(a, b)
    assert lines[0] == "A: 6.12.117 nvhe (qemu tcg)    B: 7.3.4 protected (qemu tcg)"
    assert lines[1] == "60 claims in pkvm: cannot be told → holds"
    assert max(map(len, lines)) <= 80


# ---- for machines ------------------------------------------------------------------------------------------------


def test_plain_values_have_the_whole_diff() -> None:
    one, other = (result("share/e", evidence=(Evidence("n", each),)) for each in (1, 2))
    a = atlas(result(verdict=UNTOLD, reason=NO_PVM), result("share/old"), one, kernel="6")
    b = atlas(result(), result("share/new", "none"), other, kernel="7")
    here = {"group": "share", "protection": "pkvm", "backing": "memfd"}
    assert diff.to_json(compare(a, b)) == {
        "same": False,
        "a": {"kernel": "6"},
        "b": {"kernel": "7"},
        "host": {"kernel": ["6", "7"]},
        "only_a": [{"id": "share/old", **here, "verdict": "holds"}],
        "only_b": [{"id": "share/new", **here, "protection": "none", "verdict": "holds"}],
        "verdicts": [
            {
                "id": "share/kept",
                **here,
                "a": "cannot be told",
                "b": "holds",
                "lines": [{"what": "reason", "a": NO_PVM, "b": None}],
            }
        ],
        "evidence": [{"id": "share/e", **here, "verdict": "holds", "lines": [{"what": "n", "a": "1", "b": "2"}]}],
        "equal": 0,
    }
