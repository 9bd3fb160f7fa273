# SPDX-License-Identifier: Apache-2.0
"""The page's table of hosts by protection says what hosts do: four of its cells by day, all of them at night."""

from __future__ import annotations

import pytest

from tests import matrix
from tests.nightly import NIGHTLY

pytestmark = pytest.mark.lab

BY_DAY = ["stable/pkvm", "backports/pkvm", "no gic/emulated", "nvhe/pkvm"]


@pytest.mark.parametrize("word", list(matrix.HOSTS) if NIGHTLY else BY_DAY)
def test_a_cell_says_what_its_host_does(word: str) -> None:
    [(name, protections)] = matrix.wanted([word]).items()
    row = matrix.seen(matrix.HOSTS[name], protections)
    page = matrix.written()[matrix.title(name)]
    assert row.cells == {each: page[each] for each in protections}
