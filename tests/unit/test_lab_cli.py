"""``pyvmm lab`` and ``pyvmm --lab``: what reaches the lab, and what is said before one is needed."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

from pyvmm import cli, lab
from pyvmm.cli.common import OutputPath, find_outputs, output_behind
from pyvmm.errors import HostError
from pyvmm.lab import image, needs
from pyvmm.lab.cache import Cache, FileRecord, Image, Manifest, file_sha256


class FakeLab:
    """Takes notes instead of booting."""

    booted: dict[str, object]

    def __init__(self, options, **how):
        type(self).booted = {"options": options, **how}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, command, **how):
        self.booted |= {"command": command, **how}
        return 42


@pytest.fixture
def booted(monkeypatch, tmp_path):
    """Give what a fake lab was asked, once it was."""
    made = Image(tmp_path, Manifest("9.9", "2026-01-02T03:04:05+00:00", "http://m", "r", [], {}))
    monkeypatch.setattr(lab, "Lab", FakeLab)
    monkeypatch.setattr(needs, "require", lambda **_: None)
    monkeypatch.setattr(image, "usable_image", lambda **_: made)
    FakeLab.booted = {}
    return lambda: FakeLab.booted


def test_exec_hands_on_the_command_untouched_and_gives_its_status(booted):
    assert cli.main(["lab", "exec", "--", "sh", "-c", "exit 42", "--mode", "x"]) == 42
    assert booted()["command"] == ["sh", "-c", "exit 42", "--mode", "x"]
    assert booted()["is_tty"] is False


def test_a_verb_becomes_python_in_the_lab_and_its_files_visible(booted):
    assert cli.main(["--lab", "run", "--protection", "pkvm", "some/Image", "-p", "a b"]) == 42
    verb = ["run", "--protection", "pkvm", "some/Image", "-p", "a b"]
    assert booted()["command"] == ["python3", "-P", "-m", "pyvmm", *verb]
    assert "some/Image" in booted()["arguments"]


def test_lab_run_is_the_same_as_lab_before_the_verb(booted):
    cli.main(["--lab", "run", "payload:hello"])
    before = booted()["command"]
    cli.main(["lab", "run", "run", "payload:hello"])
    assert booted()["command"] == before


@pytest.mark.parametrize("before", [["--lab"], ["lab", "run"]])
def test_files_that_a_verb_writes_are_known_to_the_lab(booted, tmp_path, before):
    dtb, log = str(tmp_path / "a b,c=d"), str(tmp_path / "serial")
    assert cli.main([*before, "run", "--dump-dtb", dtb, "--serial", f"file={log}", "payload:hello"]) == 42
    assert sorted(booted()["outputs"]) == [dtb, log]


@pytest.mark.parametrize("before", [["--lab"], ["lab", "run"]])
def test_a_file_that_cannot_be_written_is_said_before_anything_boots(booted, before, capsys):
    assert cli.main([*before, "run", "--dump-dtb", "/no/such/place/dtb", "payload:hello"]) == 2
    assert booted() == {}
    assert "/no/such/place does not exist" in capsys.readouterr().err


def test_outputs_are_found_wherever_a_command_line_has_them():
    given = Namespace(
        a=OutputPath("x"), b=["y", OutputPath("z")], c=(output_behind("file")("file=u=v"),), d="w", e=None
    )
    assert find_outputs(given) == ["x", "z", "u=v"]
    assert [type(output_behind("file")(text)) for text in ("stdio", "file=", "filed=x")] == [str] * 3


@pytest.mark.parametrize("words", [["run", "--nonsense"], ["--lab", "run", "x"], ["lab", "status"], ["--help"]])
def test_what_lab_run_cannot_run_is_said_here(booted, words):
    assert cli.main(["lab", "run", *words]) == (0 if words == ["--help"] else 2)
    assert booted() == {}


@pytest.mark.parametrize(
    "words", [["--lab", "--lab-mode", "nvhe", "--lab-icount", "--lab-mem", "1G", "run", "payload:hello"],
              ["lab", "exec", "--mode", "nvhe", "--icount", "--mem", "1G", "true"]],
)  # fmt: skip
def test_options_say_what_machine_the_lab_is(booted, words):
    cli.main(words)
    options = booted()["options"]
    assert (options.mode, options.icount, options.cpus, options.memory) == ("nvhe", True, 1, 1024)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["lab", "exec"], 2),
        (["lab", "run", "--"], 2),
        (["lab", "exec", "--mode", "fast", "true"], 2),
        (["lab", "exec", "--icount", "--cpus", "2", "true"], 2),
        (["lab", "exec", "-t", "true"], 2),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(booted, words, status, monkeypatch):
    monkeypatch.setattr("os.isatty", lambda _fd: False)
    assert cli.main(words) == status
    assert booted() == {}


def test_everything_that_is_missing_is_named_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "apt-get").touch(mode=0o755)
    with pytest.raises(HostError) as caught:
        needs.require(building=True)
    for word in ("qemu-system-aarch64", "setpriv", "dpkg-deb"):
        assert word in caught.value.message
    assert "qemu-system-arm util-linux dpkg" in (caught.value.hint or "")


def test_a_machine_without_apt_is_told_that_no_package_will_help(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="no apt"):
        needs.require(building=True)


def test_status_without_an_image_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cli.main(["lab", "status"])
    assert "none yet" in capsys.readouterr().out


def test_status_for_machines_tells_the_image(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(needs, "needs", list)
    cache = Cache()
    with cache.lock(lambda: None), cache.scratch() as scratch:
        (scratch / "Image").write_bytes(b"abc")
        files = {"Image": FileRecord(3, file_sha256(scratch / "Image"))}
        made = Manifest("9.9", "2026-01-02T03:04:05+00:00", "http://m", image.rootfs.recipe_hash(), [], files)
        cache.adopt(scratch, made)
    assert cli.main(["lab", "status", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["image"]["release"], told["image"]["size"], told["missing"]) == ("9.9", 3, [])
