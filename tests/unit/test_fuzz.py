# SPDX-License-Identifier: Apache-2.0
"""The fuzz targets, for PYVMM_FUZZ_SECONDS in all: a minute in CI, longer at night, a few seconds elsewhere."""

from __future__ import annotations

import os

import pytest

from tests.fuzz import TARGETS
from tests.fuzz.fuzzer import Unavailable, corpus

SECONDS = float(os.environ.get("PYVMM_FUZZ_SECONDS", "60" if os.environ.get("CI") else "6"))
SEED = int(os.environ.get("PYVMM_FUZZ_SEED", "1"))
#: Steps that each corpus must reach, minus differences between compilers and Pythons. A target that no longer makes
#: progress fails.
REACHED = {
    "queue": 450,
    "blk": 450,
    "net": 550,
    "mmio": 300,
    "rng": 270,
    "balloon": 320,
    "console": 370,
    "disk": 330,
    "card": 270,
    "vsock": 520,
}


@pytest.mark.parametrize("target", TARGETS)
def test_no_guest_breaks_an_invariant(target: str) -> None:
    try:
        result = TARGETS[target](target, corpus(target), SECONDS / len(TARGETS), SEED)
    except Unavailable as why:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{why}: gcc with libasan and libubsan is needed")
    assert result.edges >= REACHED[target], result
    assert result.runs >= result.corpus
