# SPDX-License-Identifier: Apache-2.0
"""A command line that Linux would truncate or panic on is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.cli import main
from pyvmm.errors import OptionError
from pyvmm.machine.cmdline import INIT_WORDS, LIMIT, check, line_in
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.fdt import Tree
from pyvmm.machine.plan import Plan
from tests.kernel_files import CODE, elf, linux_image


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "Image"
    path.write_bytes(linux_image())
    return str(path)


def planned(kernel: str, *params: str, dtb: str | None = None) -> bytes:
    with Plan(MachineConfig(kernel, params=params, dtb=dtb)) as plan:
        return plan.machine.entry.device_tree


def test_a_command_that_the_kernel_would_truncate_is_refused(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"console=ttyAMA0 quiet -- : {'x' * 1980}; echo would remove /mnt/data/old-backups/2019"
    assert main(["run", "--dry-run", "-p", line, image]) == 2
    said = capsys.readouterr().err
    assert f"has {len(line) + 1} bytes with its NUL. An arm64 Linux accepts 2048" in said


def test_the_longest_line_reaches_the_guest_whole(image: str) -> None:
    line = "a" * (LIMIT - 1)
    assert line.encode() + b"\0" in planned(image, line)
    with pytest.raises(OptionError, match="2049 bytes"):
        planned(image, line, "")


def test_the_limit_counts_bytes_and_not_characters(image: str) -> None:
    planned(image, "\u00e9" * 1023)
    with pytest.raises(OptionError, match="2049 bytes"):
        planned(image, "\u00e9" * 1024)


def test_the_limit_applies_to_all_parameters_together(image: str) -> None:
    with pytest.raises(OptionError, match="2050 bytes") as caught:
        planned(image, "a" * 1024, "b" * 1024)
    assert caught.value.options == ("params",)


def test_as_many_words_as_init_accepts_may_follow_the_dashes(image: str) -> None:
    planned(image, "quiet", "--", *"w" * INIT_WORDS)
    with pytest.raises(OptionError, match="33 words "):
        planned(image, "quiet", "--", *"w" * (INIT_WORDS + 1))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"quiet", 0),
        (b"--", 0),
        (b"a b--c d", 0),
        (b"quiet -- a  b\tc", 3),
        (b'-- "a b" c="d e" f', 3),
        (b'-- a"b c"d e', 2),
        (b'-- "a b', 1),
        (b'"--" a b', 2),
        (b"-- a -- b c", 1),  # Linux stops counting here
    ],
)
def test_words_are_counted_as_the_kernel_splits_them(line: bytes, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvmm.machine.cmdline.INIT_WORDS", words)
    check(line)
    monkeypatch.setattr("pyvmm.machine.cmdline.INIT_WORDS", words - 1)
    with pytest.raises(OptionError, match=f"^{words} words"):
        check(line)


def test_the_limits_apply_to_a_given_device_tree_too(image: str, tmp_path: Path) -> None:
    tree, file = Tree(), tmp_path / "own.dtb"
    chosen = tree.root.add("chosen", {"bootargs": "a" * (LIMIT - 1)})
    file.write_bytes(tree.to_bytes())
    planned(image, dtb=str(file))
    chosen.properties["bootargs"] = "a" * LIMIT
    file.write_bytes(tree.to_bytes())
    with pytest.raises(OptionError, match="2049 bytes") as caught:
        planned(image, dtb=str(file))
    assert caught.value.options == ("dtb",)


def test_a_device_tree_without_a_command_line_has_an_empty_one() -> None:
    assert line_in(Tree().to_bytes(), "x") == b""


def test_guests_other_than_linux_have_other_limits(tmp_path: Path) -> None:
    flat, other, vmlinux = (tmp_path / name for name in ("flat", "other", "vmlinux"))
    flat.write_bytes(CODE)
    other.write_bytes(elf())
    banner = CODE + b"Linux version 7.3.4 (pkvm)"
    vmlinux.write_bytes(elf(segments=((1, 0x8010_0000, banner, 4096),)))
    for kernel in ("payload:hello", str(flat), str(other)):
        planned(kernel, "a" * LIMIT)
    with pytest.raises(OptionError, match="2049 bytes"):
        planned(str(vmlinux), "a" * LIMIT)
