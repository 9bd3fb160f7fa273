"""The fuzz targets, for PYVMM_FUZZ_SECONDS in all: a minute in CI, longer at night, a few seconds elsewhere."""

from __future__ import annotations

import os

import pytest

from tests.fuzz import fuzzer

SECONDS = float(os.environ.get("PYVMM_FUZZ_SECONDS", "60" if os.environ.get("CI") else "6"))
SEED = int(os.environ.get("PYVMM_FUZZ_SEED", "1"))
#: Edges that each corpus reaches by itself, less what compilers differ in: a target that no longer gets anywhere fails.
REACHED = {"queue": 450, "blk": 450, "net": 550}


@pytest.mark.parametrize("target", fuzzer.TARGETS)
def test_nothing_a_guest_does_breaks_what_must_hold(target: str) -> None:
    try:
        result = fuzzer.run(target, SECONDS / len(fuzzer.TARGETS), SEED)
    except fuzzer.Unavailable as why:
        pytest.skip(str(why))
    assert result.edges >= REACHED[target], result
    assert result.runs >= result.corpus
