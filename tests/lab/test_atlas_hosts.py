# SPDX-License-Identifier: Apache-2.0
"""The atlas on limited hosts: a kernel without guest_memfd and protected VMs, and a mode without pKVM."""

from __future__ import annotations

import json
from collections.abc import Collection

import pytest

from pyvmm.atlas.claim import all_claims
from pyvmm.atlas.expected import Key, expected
from pyvmm.atlas.model import Atlas
from pyvmm.experiment.record import Verdict
from pyvmm.lab import Lab, LabOptions, build_image
from tests.nightly import NIGHTLY

pytestmark = pytest.mark.lab


def atlas(kernel: str, mode: str, *words: str) -> Atlas:
    command = ["python3", "-P", "-m", "pyvmm", "atlas", *words, "--json", "/var/tmp/atlas.json"]
    with Lab(LabOptions(mode=mode), image=build_image(kernel)) as lab:
        done = lab.capture(command, timeout=1700)
        assert done.status == 0, done.stdout.decode()[-3000:] + done.stderr.decode()
        assert b"Traceback" not in done.stdout + done.stderr
        return Atlas.from_json(json.loads(lab.capture(["cat", "/var/tmp/atlas.json"]).stdout))


HOSTS: list[tuple[str, str, tuple[str, ...]]] = [
    ("stable", "protected", ("fault-in",)),
    ("backports", "nvhe", ("share",)),
]
if NIGHTLY:  # the whole atlas
    HOSTS = [("stable", "protected", ()), ("backports", "nvhe", ()), ("backports", "vhe", ())]


@pytest.mark.parametrize(("kernel", "mode", "groups"), HOSTS)
def test_the_atlas_gives_what_the_host_lacks_as_reason_and_tries_the_rest(
    kernel: str, mode: str, groups: tuple[str, ...]
) -> None:
    seen = atlas(kernel, mode, *groups)
    assert seen.host["mode"] == mode
    protected = [result for result in seen.results if result.protection == "pkvm"]
    assert {result.verdict for result in protected} == {Verdict.UNTOLD}
    assert all("makes no protected VMs" in result.reason for result in protected)
    plain = [result for result in seen.results if (result.protection, result.backing) == ("none", "memfd")]
    assert any(result.verdict is Verdict.HOLDS for result in plain)
    if kernel == "stable":
        files = [result for result in seen.results if result.backing in ("guest_memfd", "private")]
        assert {result.verdict for result in files} == {Verdict.UNTOLD}
    assert_as_expected(seen)


@pytest.mark.skipif(not NIGHTLY, reason="the whole atlas, at night")
def test_the_atlas_of_a_host_with_larger_pages_is_as_expected() -> None:
    seen = atlas("backports-16k", "protected")
    assert seen.host["page size"] == 16384
    # There the guest meets the kernel's endless fault while its vCPUs are busy, and the experiment does not end.
    assert_as_expected(seen, but={("conversion/copying-under-load", "emulated", "guest_memfd")})


def assert_as_expected(seen: Atlas, but: Collection[Key] = ()) -> None:
    wanted = expected(seen.host, all_claims())
    assert {result.key for result in seen.results} <= wanted.keys()
    differ = [
        f"{r.id} {r.protection}/{r.backing}: {r.verdict.value} ({r.reason}), not {wanted[r.key].value}"
        for r in seen.results
        if r.verdict is not wanted[r.key] and r.key not in but
    ]
    assert not differ, "\n".join(differ)
