# SPDX-License-Identifier: Apache-2.0
"""A lab restored from a saved boot works as one that booted, and shares no randomness with other restored labs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.atlas.model import Atlas
from pyvmm.lab import Lab, LabOptions, build_image, saved
from pyvmm.lab.cache import Image
from pyvmm.lab.qemu import SHARES, find_qemu
from tests.nightly import NIGHTLY

pytestmark = pytest.mark.lab

OPTIONS = LabOptions(boot_timeout=300.0)


@pytest.fixture(scope="module")
def image() -> Image:
    return build_image()


def save(image: Image, options: LabOptions) -> Path:
    """Save a boot, once no other lab of this machine saves one; return its directory."""
    end = time.monotonic() + 600
    while (made := saved.find_or_save(find_qemu(), image, options)) is None:
        assert time.monotonic() < end
        time.sleep(1)
    made.close()
    return made.directory


@pytest.fixture(scope="module")
def boot(image: Image) -> Path:
    return save(image, OPTIONS)


@pytest.fixture(scope="module")
def labs(image: Image, boot: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Lab]]:
    """Start two labs from one saved boot, at the same time."""
    assert (boot / "state").is_file()
    directories = [tmp_path_factory.mktemp("cwd") for _ in range(2)]
    with Lab(OPTIONS, image=image, cwd=directories[0]) as one, Lab(OPTIONS, image=image, cwd=directories[1]) as other:
        yield [one, other]


def shell(lab: Lab, script: str) -> str:
    done = lab.capture(["sh", "-c", script])
    assert done.status == 0, done
    return done.stdout.decode().strip()


def written(lab: Lab, text: str) -> str:
    """Write a Python module where ``lab`` sees it, and give its name, a new one each time: a lab caches modules."""
    name = f"tried{len(list(lab.cwd.glob('tried*.py')))}"
    (lab.cwd / f"{name}.py").write_text(text)
    return name


def module(lab: Lab, text: str, **options: object) -> tuple[int, str, str]:
    """Run a Python module of this text; give its status and output."""
    done = lab.capture([written(lab, text)], is_module=True, env={"PYTHONPATH": str(lab.cwd)}, **options)
    return done.status, done.stdout.decode(), done.stderr.decode()


def test_both_labs_were_restored(labs: list[Lab]) -> None:
    assert all("-incoming" in lab.command for lab in labs)


def test_each_restored_lab_sees_its_own_directory(labs: list[Lab]) -> None:
    for number, lab in enumerate(labs):
        shell(lab, f"echo {number} > mine")
        assert (lab.cwd / "mine").read_text() == f"{number}\n"
        assert shell(lab, "pwd") == str(lab.cwd)


@pytest.mark.parametrize(
    "script", ["cat /proc/sys/kernel/random/boot_id", "head -c 16 /dev/urandom | od -A n -t x1", "mktemp -u"]
)
def test_two_labs_of_one_boot_have_nothing_random_in_common(labs: list[Lab], script: str) -> None:
    one, other = (shell(lab, script) for lab in labs)
    assert one != other


def test_two_warm_interpreters_have_their_own_random_numbers(labs: list[Lab]) -> None:
    program = "import random, uuid; print(random.random(), uuid.uuid4())"
    said = [module(lab, program) for lab in (*labs, labs[0])]
    assert len(set(said)) == 3
    assert {status for status, _, _ in said} == {0}


def test_a_restored_lab_knows_the_time(labs: list[Lab]) -> None:
    for lab in labs:
        before = time.time()
        said = float(module(lab, "import time; print(time.time())")[1])
        assert before - 2 < said < time.time() + 2


def test_a_module_starts_in_the_warm_interpreter_unless_its_environment_forbids_that(labs: list[Lab]) -> None:
    lab = labs[0]
    words = [written(lab, "import sys; print('argparse' in sys.modules, sys.argv[1:])"), "a b", "c"]
    path = {"PYTHONPATH": str(lab.cwd)}
    warm = lab.capture(words, is_module=True, env=path)
    cold = lab.capture(words, is_module=True, env={**path, "PYTHONHASHSEED": "0"})
    assert (warm.stdout, cold.stdout) == (b"True ['a b', 'c']\n", b"False ['a b', 'c']\n")


@pytest.mark.parametrize(
    ("program", "status", "words"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("raise ValueError('of mine')", 1, "ValueError: of mine"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL, ""),
        ("import os; os.kill(1, 0); print(sorted(os.listdir('/proc/self/fd')))", 0, ""),
    ],
)
def test_a_program_in_the_warm_interpreter_ends_like_any_other(
    labs: list[Lab], program: str, status: int, words: str
) -> None:
    ended, out, err = module(labs[0], program)
    assert ended == status, err
    assert words in err
    assert not out or out == "['0', '1', '2', '3']\n"  # the listing itself opens 3


def test_a_program_in_the_warm_interpreter_reads_its_input(labs: list[Lab]) -> None:
    assert module(labs[0], "import sys; print(sys.stdin.read().upper())", stdin=b"typed")[1] == "TYPED\n"


def test_the_lab_uses_byte_code_that_matches_the_tree(labs: list[Lab]) -> None:
    program = "import pyvmm.machine.machine as m, inspect; print(m.__file__, len(inspect.getsource(m)))"
    name = written(labs[0], program)
    path = f"{labs[0].cwd}:{Path(saved.__file__).parents[2]}"
    warm = labs[0].capture([name], is_module=True, env={"PYTHONPATH": path})
    cold = labs[0].capture(["python3", "-P", "-m", name], env={"PYTHONPATH": path})
    assert warm.status == cold.status == 0, warm
    assert warm.stdout == cold.stdout


def test_a_restored_lab_finds_pyvmm_on_its_path(labs: list[Lab]) -> None:
    assert re.match(r"pyvmm \d", shell(labs[0], "pyvmm --version"))


CLAIMS = ["every-fresh-page-faults", "a-host-load-faults", "a-shared-page-is-open-to-all", "a-fault-brings-one-page"]
if NIGHTLY:
    CLAIMS = []
"""What is claimed of both kinds of lab: empty means all of the atlas."""


def atlas(lab: Lab) -> dict[tuple[str, str, str], str]:
    file = "/var/tmp/atlas.json"
    done = lab.capture(["pyvmm", "atlas", *CLAIMS, "--json", file], is_module=True, timeout=1700)
    assert done.status == 0, done.stderr.decode()
    seen = Atlas.from_json(json.loads(lab.capture(["cat", file]).stdout))
    return {result.key: result.verdict.value for result in seen.results}


def test_a_restored_lab_and_a_booted_one_give_the_same_atlas(image: Image, labs: list[Lab]) -> None:
    with Lab(LabOptions(boot="fresh", boot_timeout=300.0), image=image) as fresh:
        assert "-incoming" not in fresh.command
        booted = atlas(fresh)
    restored = atlas(labs[1])
    assert booted == restored
    assert Counter(booted.values())["holds"] >= 10


@pytest.mark.parametrize("harm", ["state cut off", "RAM of zeros"])
def test_the_lab_drops_an_unusable_saved_boot_and_boots(
    harm: str, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = LabOptions(memory=768, boot_timeout=300.0)
    directory = save(image, options)
    state = directory / "state"
    match harm:
        case "state cut off":
            os.truncate(state, state.stat().st_size // 2)
        case _:
            os.truncate(directory / "ram", 0)
            os.truncate(directory / "ram", options.memory << 20)
    monkeypatch.setattr("pyvmm.lab.lab.RESTORE_SECONDS", 15.0)
    with Lab(options, image=image, bare=True) as lab:
        assert "-incoming" not in lab.command
        assert lab.capture(["true"]).status == 0
    assert not directory.exists()


def test_a_lab_boots_when_the_saved_boot_has_too_few_devices_for_its_directories(image: Image, tmp_path: Path) -> None:
    files = []
    for number in range(SHARES):
        (tmp_path / str(number)).mkdir()
        files.append(tmp_path / str(number) / "file")
        files[-1].write_text(f"{number}")
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    with Lab(OPTIONS, image=image, cwd=cwd, arguments=[str(file) for file in files]) as lab:
        assert "-incoming" not in lab.command
        assert shell(lab, "cat " + " ".join(map(str, files))) == "".join(map(str, range(SHARES)))


def test_the_lab_shows_its_start_on_a_terminal_and_not_in_a_pipe(image: Image, tmp_path: Path) -> None:
    assert image.release
    words = [sys.executable, "-m", "pyvmm", "lab", "exec", "--", "true"]
    typescript = tmp_path / "typescript"
    subprocess.run(["script", "-qec", " ".join(words), str(typescript)], check=True, capture_output=True, timeout=300)
    assert "starting the lab, " in typescript.read_text(errors="replace")
    done = subprocess.run(words, check=True, capture_output=True, timeout=300)
    assert done.stdout + done.stderr == b""
