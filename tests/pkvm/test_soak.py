# SPDX-License-Identifier: Apache-2.0
"""A part of the soak: guests of all kinds, ended in all ways, leave the host as it was. At night all of it runs."""

from __future__ import annotations

import os

import pytest

from tests.soak.__main__ import parsed, soak

pytestmark = [
    pytest.mark.pkvm,
    pytest.mark.skipif(os.geteuid() != 0, reason="the soak mounts file systems and reads the kernel's messages"),
]


def test_guests_that_end_in_all_ways_leave_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    status = soak(parsed(["--here", "--seed", "5", "--runs", "20", "--kills", "2"]))
    said = capsys.readouterr().out
    assert "seed 5: 20 runs" in said
    assert "2 VMMs killed" in said
    assert status == 0, said
