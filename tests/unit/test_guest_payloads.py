# SPDX-License-Identifier: Apache-2.0
"""Payloads are found by name, and the hint corrects a misspelt name."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm import payloads
from pyvmm.errors import PyvmmError, UsageError


def test_every_binary_has_a_description_and_every_description_a_binary() -> None:
    assert sorted(path.stem for path in Path(payloads.DIRECTORY).glob("*.bin")) == payloads.names()


def test_a_payload_is_its_file() -> None:
    for name in payloads.names():
        assert payloads.payload(name) == Path(payloads.path_of(name)).read_bytes()


def test_the_error_for_an_unknown_payload_lists_the_known_ones_and_guesses() -> None:
    with pytest.raises(UsageError) as caught:
        payloads.payload("helo")
    for name in payloads.names():
        assert name in caught.value.message
    assert caught.value.hint == "did you mean payload:hello?"


@pytest.mark.parametrize("name", ["", "../payloads/hello", "hello.bin", "HELLO", "hello\0"])
def test_nothing_but_a_payloads_name_opens_a_file(name: str) -> None:
    with pytest.raises(UsageError, match="there is no payload"):
        payloads.payload(name)


def test_a_missing_binary_is_not_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads, "DIRECTORY", tmp_path)
    with pytest.raises(PyvmmError, match="No such file") as caught:
        payloads.payload("hello")
    assert caught.value.exit_status == 1
    assert "firmware/build.py" in (caught.value.hint or "")
