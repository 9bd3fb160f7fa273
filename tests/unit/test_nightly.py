# SPDX-License-Identifier: Apache-2.0
"""CI's nightly mode: longer fuzzing from a printed seed, so that a night can be repeated, and then the soak."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NIGHTLY = Path(__file__).parents[2] / ".ci" / "nightly"


def night(folder: Path, **environment: str) -> list[str]:
    """Return the output of a night, the environment that CI gets, and what follows CI."""
    ci = folder / ".ci"
    ci.mkdir(exist_ok=True)
    shutil.copy(NIGHTLY, ci)
    for program, says in (
        (ci / "run", "$PYVMM_FUZZ_SECONDS $PYVMM_FUZZ_SEED [${PYVMM_NIGHTLY-unset}]"),
        (folder / ".run", "$*"),
    ):
        program.write_text(f'#!/bin/sh\necho "{says}"\n')
        program.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYVMM_FUZZ_")}
    done = subprocess.run(
        [ci / "nightly"], env=inherited | environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()


def test_a_night_fuzzes_for_ten_minutes_from_a_seed_that_repeats_it(tmp_path: Path) -> None:
    said, found, soak = night(tmp_path)
    seconds, seed, nightly = found.split()
    assert seconds == "600"
    assert nightly == "[1]"
    assert int(seed) > 1
    assert f"PYVMM_FUZZ_SEED={seed} " in said
    assert night(tmp_path, PYVMM_FUZZ_SEED=seed) == [said, found, soak]
    assert soak == f"python -m tests.soak --seed {seed}"


@pytest.mark.parametrize("name", ["run", "nightly"])
def test_hosted_ci_runs_the_scripts_that_users_can_run(name: str) -> None:
    root = NIGHTLY.parents[1]
    workflow = root / ".github/workflows" / f"{name.replace('run', 'ci')}.yml"
    assert re.findall(r"^\s*(?:- )?run: (.*)$", workflow.read_text(), re.MULTILINE) == [f".ci/{name}"]
    assert os.access(root / ".ci" / name, os.X_OK)
