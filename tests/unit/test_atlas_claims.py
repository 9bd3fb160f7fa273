# SPDX-License-Identifier: Apache-2.0
"""The rules for claims, and how claims are selected by name."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest

from pyvmm.atlas import expected
from pyvmm.atlas.claim import GROUPS, Claim, all_claims, group, select
from pyvmm.atlas.task import tasks
from pyvmm.errors import UsageError
from pyvmm.experiment.record import Value, Verdict
from pyvmm.memory.choices import BACKINGS
from pyvmm.protection import Protection

CLAIMS = all_claims()
IDS = [claim.id for claim in CLAIMS]


def test_every_group_has_claims_and_there_are_60_or_more() -> None:
    assert {claim.group for claim in CLAIMS} == set(GROUPS)
    assert len(CLAIMS) >= 60


@pytest.mark.parametrize("claim", CLAIMS, ids=IDS)
def test_a_claim_is_one_sentence_with_an_origin(claim: Claim) -> None:
    assert re.fullmatch(r"[A-Z0-9].*[^.]\.", claim.says), claim.says
    assert ". " not in claim.says.replace("e.g. ", "")
    assert len(claim.says) <= 200
    assert any(word in claim.origin for word in ("thread", "Documentation/", ".c", ".h", "(2)", "(5)")), claim.origin
    assert claim.id == f"{claim.group}/{claim.function.__name__.replace('_', '-')}"


@pytest.mark.parametrize("claim", CLAIMS, ids=IDS)
def test_a_claim_is_tried_only_where_a_machine_can_be_built(claim: Claim) -> None:
    for place in claim.places:
        assert place.backing in BACKINGS
        if place.protection is Protection.PKVM:
            assert place.backing in ("memfd", "thp")
        if place.protection is Protection.EMULATED:
            assert place.backing != "hugetlb"
    assert len(set(claim.places)) == len(claim.places)


def test_claims_are_found_by_id_by_group_and_by_id_without_the_group() -> None:
    whole = CLAIMS[0]
    assert select([whole.id], CLAIMS) == [whole]
    assert select([whole.id.partition("/")[2]], CLAIMS)[0] == whole
    assert {claim.group for claim in select(["teardown", "share"], CLAIMS)} == {"teardown", "share"}
    assert select([], CLAIMS) == CLAIMS


@pytest.mark.parametrize(
    ("asked", "offered"),
    [
        ("every-fresh-page-fault", "fault-in/every-fresh-page-faults"),
        ("fault-in/a-first-raed-faults-once", "fault-in/a-first-read-faults-once"),
        ("shares", "share"),
        ("memlock", "fault-in/memlock-exhaustion-is-resumable"),
        ("zzzz", "groups are fault-in"),
        ("", "groups are fault-in"),
    ],
)
def test_an_unknown_claim_is_refused_with_the_nearest_names(asked: str, offered: str) -> None:
    with pytest.raises(UsageError, match=f"no claim is called '{asked}'") as caught:
        select([asked], CLAIMS)
    assert offered in (caught.value.hint or "")


def test_every_module_of_claims_is_named_after_its_group() -> None:
    """So a request for one group imports no other group."""
    for claim in CLAIMS:
        module = claim.function.__module__.rpartition(".")[2]
        assert module.startswith(claim.group.replace("-", "_"))
    script = (
        "import sys; from pyvmm.atlas.claim import all_claims; all_claims(['huge', 'lazy/x']); "
        "print({m.rpartition('.')[2] for m in sys.modules if 'atlas.claims.' in m})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("{'huge', 'lazy'}", "{'lazy', 'huge'}")


def test_places_can_be_selected() -> None:
    everything = tasks(CLAIMS)
    assert {task.place.protection for task in tasks(CLAIMS, ["pkvm"])} == {Protection.PKVM}
    assert {task.place.backing for task in tasks(CLAIMS, [], ["private"])} == {"private"}
    assert len(everything) == sum(len(claim.places) for claim in CLAIMS)


def test_an_unknown_group_and_a_claim_without_places_are_refused() -> None:
    with pytest.raises(ValueError, match="no group"):
        group("nonsense")
    with pytest.raises(ValueError, match="nowhere"):
        group("share")(origin="thread")(lambda _x: None)


# -- the expected verdicts


TABLES = tomllib.loads(expected.FILE.read_text())


@pytest.mark.parametrize("name", TABLES)
def test_every_expectation_is_for_an_existing_claim_and_place(name: str) -> None:
    kernel, mode, *page = name.split()
    assert set(TABLES[name]) - {"like", "lacks"} <= set(IDS)
    assert TABLES[name].get("like", name) in TABLES
    size = int(page[0].removesuffix("k")) if page else 4
    host: dict[str, Value] = {"kernel": f"{kernel}.1", "mode": mode, "page size": size << 10}
    assert expected.table_name(host) == name
    verdicts = expected.expected(host, CLAIMS)
    assert set(verdicts) <= {(c.id, p.protection.value, p.backing) for c in CLAIMS for p in c.places}
    assert Verdict.CRASHED not in verdicts.values()


def test_the_newest_known_kernel_has_an_expectation_for_every_claim_everywhere() -> None:
    verdicts = expected.expected({"kernel": "7.3.4+deb13-arm64", "mode": "protected"}, CLAIMS)
    assert set(verdicts) == {(c.id, p.protection.value, p.backing) for c in CLAIMS for p in c.places}


def test_a_table_has_what_differs_from_the_one_that_it_is_like() -> None:
    with_pkvm = expected.expected({"kernel": "7.3", "mode": "protected"}, CLAIMS)
    without = expected.expected({"kernel": "7.3", "mode": "nvhe"}, CLAIMS)
    assert set(without) == set(with_pkvm)
    assert {verdict for key, verdict in without.items() if key[1] == "pkvm"} == {Verdict.UNTOLD}
    differ = {key for key, verdict in without.items() if key[1] != "pkvm" and verdict is not with_pkvm[key]}
    assert differ == {("teardown/a-host-runs-255-vms", "none", "memfd")}


def test_an_unknown_kernel_has_no_expectations() -> None:
    assert expected.expected({"kernel": "99.1", "mode": "protected"}, CLAIMS) == {}
    assert expected.expected({}, CLAIMS) == {}
