# SPDX-License-Identifier: Apache-2.0
"""Every requirement of the tests is pinned to a version that pyproject.toml accepts."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ASKED = [
    *PROJECT["project"]["dependencies"],
    *PROJECT["project"]["optional-dependencies"]["bench"],
    *PROJECT["dependency-groups"]["dev"],
]


def pinned() -> dict[str, str]:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    found = [re.fullmatch(r"([\w.-]+)==(\S+)", line) for line in lines if not line.startswith("#")]
    assert all(found)
    return {canonicalize_name(match[1]): match[2] for match in found if match}


@pytest.mark.parametrize("asked", ASKED)
def test_every_requirement_of_the_tests_is_pinned_to_an_accepted_version(asked: str) -> None:
    requirement = Requirement(asked)
    version = pinned().get(canonicalize_name(requirement.name))
    assert version is not None, f"{requirement.name} is not in .ci/constraints.txt"
    assert version in requirement.specifier
