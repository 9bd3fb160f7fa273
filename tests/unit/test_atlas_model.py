# SPDX-License-Identifier: Apache-2.0
"""An atlas as JSON: files of an older pyvmm can be read, and other files are refused with a clear error."""

from __future__ import annotations

from typing import Any

import pytest

from pyvmm.atlas.model import Atlas
from pyvmm.errors import UsageError
from tests.unit import atlas_samples as samples


def test_reading_format_1_gives_the_labs_clock_its_present_name() -> None:
    now = samples.realistic()
    data = now.to_json()
    assert (data["atlas"], now.host["tcg"]) == (2, True)
    host = {{"tcg": "emulated"}.get(name, name): value for name, value in data["host"].items()}
    assert Atlas.from_json(data | {"atlas": 1, "host": host}) == now
    assert "tcg" not in Atlas.from_json(data | {"host": host}).host  # format 2 has no such name


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ([], "a.json is not an atlas"),
        ({"pyvmm bench": 2}, "a.json is not an atlas"),
        ({"atlas": 3, "claims": []}, "a.json is an atlas of format 3; this pyvmm reads formats 1 and 2"),
        ({"claims": []}, "a.json is an atlas of format None"),
        ({"atlas": 2, "claims": []}, "a.json is not a whole atlas: KeyError: 'host'"),
        ({"atlas": 1, "claims": [], "host": 3}, "a.json is not a whole atlas: AttributeError"),
    ],
)
def test_a_file_that_is_not_an_atlas_is_refused_with_its_name(data: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Atlas.from_json(data, "a.json")
