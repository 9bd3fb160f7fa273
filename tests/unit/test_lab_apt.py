# SPDX-License-Identifier: Apache-2.0
"""Debian's packages for the lab: the mirror, the suites, the age of the lists, and the errors when apt fails."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.lab import apt, kernels
from pyvmm.lab.apt import Apt, AptError, Package


def fake_program(directory: Path, name: str, script: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.fixture
def fake_bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a directory whose programs take precedence over the system's."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/usr/sbin:/usr/bin:/sbin:/bin")
    return directory


def test_the_mirror_is_the_one_this_machine_uses(fake_bin: Path) -> None:
    lines = "Ubuntu|main|http://u/ubuntu/\nDebian|contrib|http://c/\nDebian|main|http://local/debian/"
    fake_program(fake_bin, "apt-get", f"printf '%s\\n' '{lines}'")
    assert apt.machine_mirror() == "http://local/debian"


def test_the_mirror_is_debians_if_this_machine_is_not_debian(fake_bin: Path) -> None:
    fake_program(fake_bin, "apt-get", "echo 'Ubuntu|main|http://u/ubuntu/'")
    assert apt.machine_mirror() == apt.CANONICAL_MIRROR


def test_the_error_for_missing_keys_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "KEYRING", tmp_path / "none.gpg")
    with pytest.raises(HostError) as caught:
        Apt(tmp_path, "http://m").prepare()
    assert caught.value.hint == "apt install debian-archive-keyring"


@pytest.mark.parametrize(
    ("said", "offline", "hint"),
    [
        ("E: Failed to fetch http://m/x  Could not resolve 'm'", True, "offline"),
        ("E: You don't have enough free space in /x.\nE: No space left on device", False, "600 MB"),
        ("E: Unable to locate package nonsense", False, None),
    ],
)
def test_the_error_of_a_failing_apt_has_its_output_and_a_hint(
    tmp_path: Path, fake_bin: Path, said: str, offline: bool, hint: str | None
) -> None:
    fake_program(fake_bin, "apt-get", f"cat >&2 <<'E'\nReading...\n{said}\nE\nexit 100")
    mine = Apt(tmp_path / "apt", "http://m")
    (tmp_path / "apt" / "archives").mkdir(parents=True)
    with pytest.raises(AptError) as caught:
        mine.update(lambda *_: None)
    assert said.splitlines()[0] in caught.value.message
    assert caught.value.offline is offline
    assert (caught.value.hint is None) if hint is None else (hint in (caught.value.hint or ""))


def test_apt_fetches_a_corrupt_package_of_an_earlier_build_again(tmp_path: Path, fake_bin: Path) -> None:
    fake_program(fake_bin, "apt-get", "printf whole > p_1_all.deb; echo dlstatus:1:50.0:p; echo dlstatus:1:100.0:p")
    mine = Apt(tmp_path, "http://m")
    mine.archives.mkdir()
    (mine.archives / "p_1_all.deb").write_bytes(b"wrong")
    whole = hashlib.sha256(b"whole").hexdigest()
    shares = []
    mine.download([Package("p", "1", "p_1_all.deb", 5, whole)], lambda _what, share: shares.append(share))
    assert (mine.archives / "p_1_all.deb").read_bytes() == b"whole"
    assert shares == [0.0, 0.5, 1.0, 1.0]


def write_config(directory: Path, mirror: str = "http://m", suites: tuple[str, ...] = kernels.SUITES["stable"]) -> Apt:
    mine = Apt(directory, mirror, suites)
    mine.prepare()
    return mine


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys.gpg").touch()
    monkeypatch.setattr(apt, "KEYRING", tmp_path / "keys.gpg")


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("name", kernels.SUITES)
def test_apt_knows_the_suites_a_kernel_needs_and_no_others(tmp_path: Path, name: str) -> None:
    write_config(tmp_path, suites=kernels.SUITES[name])
    lines = (tmp_path / "sources.list").read_text().splitlines()
    assert [line.split()[3] for line in lines] == list(kernels.SUITES[name])
    assert all(f"[signed-by={tmp_path}/keys.gpg]" in line for line in lines)
    assert ("sid" in kernels.SUITES[name]) == (name.removesuffix(kernels.LARGE) in ("unstable", "experimental"))


@pytest.mark.usefixtures("keys")
def test_lists_are_fresh_only_for_suites_fetched_from_this_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Apt, "_watch", lambda *_: None)
    assert write_config(tmp_path).newest_age() is None
    write_config(tmp_path).update(lambda *_: None)
    assert 0 <= (write_config(tmp_path).newest_age() or 0) < 100
    assert write_config(tmp_path, "http://other").newest_age() is None
    assert write_config(tmp_path, suites=kernels.SUITES["unstable"]).newest_age() is None
    write_config(tmp_path, suites=kernels.SUITES["unstable"]).update(lambda *_: None)
    os.utime(tmp_path / "fetched-sid", (1, 1))
    assert (write_config(tmp_path, suites=kernels.SUITES["unstable"]).newest_age() or 0) > 1e6
    assert (write_config(tmp_path).newest_age() or 0) < 100
