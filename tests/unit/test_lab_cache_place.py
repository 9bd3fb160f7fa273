# SPDX-License-Identifier: Apache-2.0
"""The directories of the lab's cache and of the runs' sockets, under any environment."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.lab.cache import cache_directory
from pyvmm.session import control

OWN = pwd.getpwuid(os.getuid()).pw_dir


@pytest.mark.parametrize(
    ("cache", "home", "place"),
    [
        ("/c", "/h", "/c"),
        (None, "/h", "/h/.cache"),
        ("", "/h", "/h/.cache"),
        ("rel", "/h", "/h/.cache"),
        ("~/c", "/h", "/h/.cache"),
        ("./c", "/h", "/h/.cache"),
        ("rel", "", f"{OWN}/.cache"),
        (None, None, f"{OWN}/.cache"),
        (None, "rel", f"{OWN}/.cache"),
        ("/c", "", "/c"),
    ],
)
def test_the_cache_directory_follows_the_xdg_specification(
    cache: str | None, home: str | None, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("XDG_CACHE_HOME", cache), ("HOME", home)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache_directory() == Path(place) / "pyvmm" / "lab"


@pytest.mark.parametrize("known", [None, "", "rel"])
def test_the_error_for_a_user_without_a_home_says_what_to_set(
    known: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(_uid: int) -> pwd.struct_passwd:
        if known is None:
            raise KeyError
        return pwd.struct_passwd(("u", "x", 1, 1, "", known, "/bin/sh"))

    monkeypatch.setattr(pwd, "getpwuid", look)
    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(HostError, match="no home directory") as caught:
        cache_directory()
    assert "XDG_CACHE_HOME" in str(caught.value.hint)


def test_a_relative_runtime_directory_is_not_used_for_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    usual = control.directory()
    for wrong in ("", "rel", "./run"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", wrong)
        assert control.directory() == usual
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    assert control.directory() == "/run/user/1/pyvmm"
