# SPDX-License-Identifier: Apache-2.0
"""Peers: how their output is read, what the error says if one is missing, and how their trees are kept."""

from __future__ import annotations

import platform
import shutil
import stat
import tarfile
from pathlib import Path

import pytest

from pyvmm.bench import linux, peers
from pyvmm.bench.peers import boot, fault_in, loops, qemu, selftests, transfers
from pyvmm.bench.qemu import command
from pyvmm.errors import HostError, PyvmmError
from pyvmm.lab import peers as lab_peers
from pyvmm.lab import selftests as tests_of_the_kernel
from pyvmm.lab.apt import silent
from pyvmm.lab.cache import Cache
from pyvmm.lab.kbuild import KernelBuildError
from pyvmm.lab.trees import Recipe, Scratch, find_tree, made_tree, usable_tree
from pyvmm.labenv import TREES

USAGE = """
     Guest mode IDs:
         3:    PA-bits:48,  VA-bits:48,  4K pages{0}
         4:    PA-bits:48,  VA-bits:48, 16K pages (supported)
         6:    PA-bits:40,  VA-bits:48,  4K pages{1}
         8:    PA-bits:40,  VA-bits:48, 64K pages (supported)
"""

TRACKED = """Using lru_gen for aging
Populating memory             : 0.111778688s
Initial aging pass (lru_gen)
Mark memory idle (lru_gen)    : 0.012072928s
Writing to idle memory        : 0.004647536s
Mark memory idle (lru_gen)    : 0.015298752s
"""

EXITS = """exits: what=store round=0 count=1000 ticks=1250000 hz=62500000\r
exits: what=hvc round=0 count=1000 ticks=62500 hz=62500000
exits: what=store round=1 count=500 ticks=625 hz=62500000
exits: what=store round=2 count=10
"""


@pytest.mark.parametrize(("in_48", "in_40", "wanted"), [(True, True, "6"), (True, False, "3"), (False, True, "6")])
def test_a_selftest_runs_a_guest_with_small_pages_and_pyvmms_address_size(
    in_48: bool, in_40: bool, wanted: str
) -> None:
    marks = (" (supported)" if each else "" for each in (in_48, in_40))
    assert selftests.guest_mode(USAGE.format(*marks)) == wanted


def test_a_host_without_small_pages_is_refused() -> None:
    with pytest.raises(HostError, match="pages of 4 KiB"):
        selftests.guest_mode(USAGE.format("", ""))


def test_steps_and_totals_are_read_in_nanoseconds() -> None:
    assert selftests.steps(TRACKED) == {
        "Populating memory": 111778688,
        "Mark memory idle (lru_gen)": 15298752,
        "Writing to idle memory": 4647536,
    }
    assert selftests.longest("vCPU 1 execution time: 1.886359104s\nvCPU 0 execution time: 0.5\n") == 1886359104
    with pytest.raises(PyvmmError, match=r"does not say.*Killed"):
        selftests.longest("Started all vCPUs\nKilled\n")


def test_the_payloads_lines_become_nanoseconds_per_exit() -> None:
    assert qemu.parse(EXITS) == {"store": [20000.0, 20.0], "hvc": [1000.0]}


def test_a_ratio_compares_the_same_turns_except_the_first() -> None:
    own, other = [[900.0], [110.0], [300.0], [95.0]], [[100.0], [100.0], [200.0], [100.0]]
    assert peers.ratio(own, other) == 1.1


def test_the_peer_axis_tells_the_two_of_a_pair_apart() -> None:
    theirs, ours = peers.pair(
        "qemu", {"what": "store"}, "exit", [[2.0], [3.0]], [[4.0], [4.0]], clocks=("guest", "host"), per="exit"
    )
    assert (theirs.point["peer"], theirs.clock, theirs.kept) == ("qemu", "guest", (4.0,))
    assert (ours.point["peer"], ours.clock, ours.kept) == ("pyvmm", "host", (3.0,))
    assert ours.notes == {"ratio to qemu": 0.75}
    assert theirs.key != ours.key


def test_guests_under_qemu_have_one_machine_and_their_requested_devices() -> None:
    guest = linux.Files("Image", "init.cpio", ("pyvmm",))
    bare = command(["qemu"], "exits.bin", "count=1", memory=128)
    full = linux.qemu(["qemu"], guest, 2, "-device", "virtio-rng-device")
    for argv, wanted in (
        (bare, {"-smp": "1", "-m": "128", "-kernel": "exits.bin", "-append": "count=1"}),
        (full, {"-smp": "2", "-m": "256", "-kernel": "Image", "-initrd": "init.cpio", "-append": linux.PARAMETERS}),
    ):
        wanted |= {"-M": "virt,gic-version=host", "-accel": "kvm", "-cpu": "host", "-serial": "stdio"}
        assert {option: argv[argv.index(option) + 1] for option in wanted} == wanted
        assert {"-nodefaults", "-no-user-config", "-no-reboot"} < set(argv)
    assert "-initrd" not in bare
    assert full[-2:] == ["-device", "virtio-rng-device"]


def test_a_guest_under_kvmtool_differs_only_in_its_console() -> None:
    argv = linux.kvmtool(["lkvm"], linux.Files("Image", "init.cpio", ("pyvmm",)), 2)
    wanted = {"--cpus": "2", "--mem": "256", "--kernel": "Image", "--initrd": "init.cpio", "--network": "mode=none"}
    assert argv[:2] == ["lkvm", "run"]
    assert {option: argv[argv.index(option) + 1] for option in wanted} == wanted
    assert argv[argv.index("--params") + 1] == "console=ttyS0 quiet panic=-1"


def test_every_peer_has_its_measurement() -> None:
    there = {**boot.PEERS, **fault_in.PEERS, **loops.PEERS, **qemu.PEERS, **selftests.PEERS, **transfers.PEERS}
    assert set(there) == set(peers.PEERS)


def test_the_series_of_a_missing_peer_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(TREES, f"selftests={tmp_path}/gone")
    [elsewhere] = peers.measure("qemu") if platform.machine() != "aarch64" else [peers.missing("qemu", "--lab")]
    assert "--lab" in elsewhere.unavailable
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for name in peers.PEERS:
        if name == "twin":
            continue  # it needs only this checkout
        [series] = peers.measure(name)
        assert series.point == {"peer": name}
        assert not series.values
        assert "is not here\n  hint: " in series.unavailable or "apt install qemu-system-arm" in series.unavailable


# -- trees


class Maker:
    """Makes a tree of one file, and counts how often."""

    def __init__(self) -> None:
        self.made = 0
        self.raises: Exception | None = None

    def __call__(self, scratch: Scratch, _progress: object) -> str:
        if self.raises:
            raise self.raises
        self.made += 1
        (scratch.downloads / "package").write_text("big")
        (scratch.work / "between").write_text("")
        (scratch.tree / "program").write_text(f"made {self.made}")
        return f"source {self.made}"

    def recipe(self, digest: str = "one", name: str = "things") -> Recipe:
        return Recipe(name, digest, self)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "lab")


def test_a_tree_is_made_once_and_again_for_another_recipe(cache: Cache) -> None:
    maker = Maker()
    first = made_tree(maker.recipe(), cache=cache)
    assert made_tree(maker.recipe(), cache=cache) == first == usable_tree(maker.recipe(), cache)
    assert sorted(path.name for path in first.iterdir()) == ["manifest.json", "program"]
    second = made_tree(maker.recipe("two"), cache=cache)
    assert (maker.made, second != first) == (2, True)
    assert first.is_dir(), "a lab may be starting from it"
    assert not list(cache.directory.glob("peers/downloads/*"))
    assert not (cache.directory / "peers-partial").exists()


def test_a_damaged_tree_is_made_again(cache: Cache) -> None:
    maker = Maker()
    (made_tree(maker.recipe(), cache=cache) / "program").write_text("")
    assert usable_tree(maker.recipe(), cache) is None
    assert (made_tree(maker.recipe(), cache=cache) / "program").read_text() == "made 2"


def test_the_error_for_a_full_disk_says_what_to_do(cache: Cache) -> None:
    maker = Maker()
    maker.raises = OSError(28, "No space left on device")
    with pytest.raises(PyvmmError, match="no space left") as caught:
        made_tree(maker.recipe(), cache=cache)
    assert "XDG_CACHE_HOME" in (caught.value.hint or "")


def test_the_environment_says_where_trees_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tree = made_tree(Maker().recipe())
    assert find_tree("things") == tree
    elsewhere = tmp_path / "shown"
    tree.rename(elsewhere)
    assert find_tree("things") is None
    shown = lab_peers.Prepared({"a": tmp_path, "things": elsewhere}, {})
    monkeypatch.setenv(TREES, shown.environment[TREES])
    assert find_tree("things") == elsewhere
    assert find_tree("a") is None


def test_peers_that_cannot_be_prepared_are_left_out_with_the_reason(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = Maker(), Maker()
    bad.raises = HostError("there is no compiler", hint="apt install one")
    monkeypatch.setattr(lab_peers, "ALL", {"good": good.recipe, "bad": lambda: bad.recipe(name="bad")})
    prepared = lab_peers.prepare(("good", "bad"), cache=cache)
    assert list(prepared.trees) == ["things"]
    assert prepared.lacking == {"bad": "there is no compiler\n  hint: apt install one"}
    assert prepared.paths == [str(prepared.trees["things"])]


# -- building the selftests

MAKE = r"""
echo "$*" >> "$HOME/made"
for word in "$@"; do
    case "$word" in
    /*_test) [ ! -e "$HOME/fail" ] || { echo "lib/x.c:1:2: error: no such thing"; exit 2; }; echo ELF > "$word";;
    esac
done
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tests_of_the_kernel.SelftestTree:
    make = tmp_path / "bin" / "make"
    make.parent.mkdir()
    make.write_text(f"#!/bin/sh\n{MAKE}")
    make.chmod(make.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{make.parent}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "linux" / tests_of_the_kernel.DIRECTORY).mkdir(parents=True)
    return tests_of_the_kernel.SelftestTree(tmp_path / "linux", tmp_path / "log", {"ARCH": "arm64"})


def test_the_build_makes_headers_before_the_three_programs(
    tree: tests_of_the_kernel.SelftestTree, tmp_path: Path
) -> None:
    built = tree.build(tmp_path, silent)
    assert [path.name for path in built] == list(tests_of_the_kernel.PROGRAMS)
    assert all(path.read_text() == "ELF\n" for path in built)
    made = (tmp_path / "made").read_text().splitlines()
    assert made[0].endswith("headers")
    assert all("ARCH=arm64" in line and "LDLIBS=-static -s" in line and "PER_VCPU" in line for line in made[1:])


def test_the_error_of_a_failed_build_has_its_target_and_the_compilers_output(
    tree: tests_of_the_kernel.SelftestTree, tmp_path: Path
) -> None:
    (tmp_path / "fail").touch()
    with pytest.raises(KernelBuildError, match="the kernel's KVM selftests could not be built") as caught:
        tree.build(tmp_path, silent)
    assert "| lib/x.c:1:2: error: no such thing" in caught.value.message


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("Makefile", True),
        ("tools/testing/selftests/kvm/lib/kvm_util.c", True),
        ("tools/testing/selftests/clone3/clone3_selftests.h", True),
        ("tools/testing/selftests/net/tls.c", False),
        ("lib/rbtree.c", True),
        ("lib/crypto/aes.c", False),
        ("drivers/tty/serial/amba-pl011.c", False),
        ("include/uapi/linux/kvm.h", True),
        ("include/linux/kvm_host.h", False),
    ],
)
def test_only_the_sources_of_the_selftests_are_unpacked_from_the_kernel(
    tree: tests_of_the_kernel.SelftestTree, tmp_path: Path, path: str, wanted: bool
) -> None:
    member = tarfile.TarInfo(f"linux-source-7.3/{path}")
    archive = tmp_path / "archive.tar"
    with tarfile.open(archive, "w") as out:
        out.addfile(member)
    with tarfile.open(archive) as tar:
        tree._place(tar, member)
    assert (tree.directory / path).exists() == wanted
