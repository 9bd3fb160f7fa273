# SPDX-License-Identifier: Apache-2.0
"""The whole atlas on a real host: verdicts are as expected, repeat, and no host property causes a traceback."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyvmm.atlas.claim import all_claims
from pyvmm.atlas.expected import expected
from pyvmm.atlas.model import Atlas
from pyvmm.experiment import Experiment
from pyvmm.experiment.record import Verdict
from pyvmm.protection import Protection
from tests.nightly import NIGHTLY
from tests.pkvm.harness import Footprint

pytestmark = pytest.mark.pkvm
ROOT = Path(__file__).resolve().parents[2]


def atlas(directory: Path, *words: str, **options: Any) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run ``pyvmm atlas`` with --json and return how it ended and what it wrote."""
    file = directory / f"atlas{len(list(directory.iterdir()))}.json"
    command = [sys.executable, "-m", "pyvmm", "atlas", "--json", str(file), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700, check=False, **options)
    assert "Traceback" not in done.stdout + done.stderr
    return done, json.loads(file.read_text()) if file.exists() else {}


STRAY = 3
"""Experiments of 800 that may stop for reasons of the emulator's own, such as an SError out of the blue."""


def settled(data: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Repeat experiments that stopped without their expected verdict, once. The second result counts."""
    seen = Atlas.from_json(data)
    wanted = expected(seen.host, all_claims())
    stopped = {r.key: r.reason for r in seen.results if r.verdict is Verdict.UNTOLD}
    stopped = {key: reason for key, reason in stopped.items() if wanted.get(key, Verdict.UNTOLD) is not Verdict.UNTOLD}
    assert len(stopped) <= STRAY, stopped
    if not stopped:
        return data
    _, again = atlas(directory, *sorted({key[0] for key in stopped}))
    key = ("id", "protection", "backing")
    new = {tuple(claim[name] for name in key): claim for claim in again["claims"]}
    claims = [(tuple(claim[name] for name in key), claim) for claim in data["claims"]]
    return data | {"claims": [new[place] if place in stopped else claim for place, claim in claims]}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the whole atlas once."""
    directory = tmp_path_factory.mktemp("atlas")
    done, data = atlas(directory)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return settled(data, directory)


def without_times(data: dict[str, Any]) -> dict[str, Any]:
    data = copy.deepcopy(data)
    del data["times"]
    for claim in data["claims"]:
        del claim["times"]
    return data


def test_every_verdict_is_as_expected_of_this_kernel(first: dict[str, Any]) -> None:
    seen = Atlas.from_json(first)
    wanted = expected(seen.host, all_claims())
    if not wanted:
        pytest.skip(f"nothing is known of {seen.host['kernel']} in mode {seen.host['mode']} to compare with")
    differ = [
        f"{result.id} {result.protection}/{result.backing}: {result.verdict.value}, not {wanted[result.key].value}; "
        f"{result.reason} {[e for e in result.evidence if e.ok is False]}"
        for result in seen.results
        if result.key in wanted and result.verdict is not wanted[result.key]
    ]
    assert not differ, "\n".join(differ)


def test_the_atlas_tried_every_claim_everywhere_and_none_crashed(first: dict[str, Any]) -> None:
    seen = Atlas.from_json(first)
    places = {(c.id, p.protection.value, p.backing) for c in all_claims() for p in c.places}
    assert {result.key for result in seen.results} == places
    assert [f"{r.id}: {r.reason}" for r in seen.results if r.verdict is Verdict.CRASHED] == []


AGAIN = () if NIGHTLY else ("share", "private-fd")
"""Groups of claims to try once more: none means all."""


def test_a_second_run_differs_in_times_only(first: dict[str, Any], tmp_path: Path) -> None:
    """Only protected guests are repeated here. `pyvmm atlas diff` compares two whole runs."""
    _, second = atlas(tmp_path, "--protection", "pkvm", *AGAIN)
    before, after = without_times(first), without_times(settled(second, tmp_path))
    before["claims"] = [
        claim
        for claim in before["claims"]
        if claim["protection"] == "pkvm" and (not AGAIN or claim["id"].partition("/")[0] in AGAIN)
    ]
    differ = [(a, b) for a, b in zip(before["claims"], after["claims"], strict=True) if a != b]
    assert not differ, json.dumps(differ[:3], indent=1)
    assert before == after


LACKING = () if NIGHTLY else ("fault-in", "huge", "lazy")
"""Groups of claims that need what an unprivileged user lacks most: none means all."""


def test_every_experiment_of_an_unprivileged_user_ends_with_a_verdict(tmp_path: Path) -> None:
    """The user has no tracefs, no huge pages, no userfaultfd for kernel faults, and little lockable memory."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    os.chmod("/dev/kvm", 0o666)
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o755)
    places = ("--protection", "none", "--protection", "pkvm")
    done, data = atlas(tmp_path, *places, *LACKING, user=65534, group=65534, extra_groups=[])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    seen = Atlas.from_json(data)
    crashed = [f"{r.id} {r.protection}/{r.backing}: {r.reason}" for r in seen.results if r.verdict is Verdict.CRASHED]
    assert not crashed, "\n".join(crashed)
    assert any("faults cannot be counted" in result.reason for result in seen.results)
    assert any(result.verdict is Verdict.HOLDS for result in seen.results)


def test_an_interrupted_atlas_keeps_the_results_it_has(tmp_path: Path) -> None:
    file = tmp_path / "atlas.json"
    command = [sys.executable, "-u", "-m", "pyvmm", "atlas", "fault-in", "--json", str(file)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(5):
            process.stdout.readline()
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 128 + 15
    assert 5 <= len(json.loads(file.read_text())["claims"]) < 79


# -- the interface that claims are written with


def test_an_experiment_leaves_nothing_behind_even_if_its_run_fails() -> None:
    with Experiment(Protection.PKVM) as x:
        x.guest.ping()
    before = Footprint.now()
    with Experiment(Protection.PKVM, cpus=2, faults=True) as x:
        page = x.page()
        x.guest.write64(page, 1)
        x.memory.punch(page, 4096, unsafe=True)
        x.others()
    with pytest.raises(ZeroDivisionError), Experiment(Protection.EMULATED) as x:
        _ = 1 // x.guest.sum(x.page(), 8)
    assert Footprint.now() == before


def test_a_claim_can_be_written_in_ten_lines() -> None:
    with Experiment(Protection.PKVM) as x:
        page = x.page()
        x.guest.write64(page, 42)
        x.check("the host is locked out", x.host64(page) is None)
        x.guest.share(page)
        x.check("the host reads what the guest wrote", x.host64(page), 42)
        assert "S shared 1" in x.map()
        assert "1 shared" in x.exits()
    assert x.verdict is Verdict.HOLDS


def test_a_script_at_the_repl_prompt_has_a_guest_and_its_memory() -> None:
    script = "page = vm.page(); guest.write64(page, 7); guest.share(page)\nprint(vm.host64(page), vm.exits())\n"
    command = [sys.executable, "-m", "pyvmm", "repl", "--protection", "pkvm"]
    done = subprocess.run(command, cwd=ROOT, input=script, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("7 ")
    failing = subprocess.run(command, cwd=ROOT, input="1/0", capture_output=True, text=True, timeout=60, check=False)
    assert failing.returncode == 1
    assert "ZeroDivisionError" in failing.stderr
    assert "bug in pyvmm" not in failing.stderr
