# SPDX-License-Identifier: Apache-2.0
"""The project's own kernel: its inputs, and when it is rebuilt."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.lab import ownkernel
from pyvmm.lab.apt import AptError
from pyvmm.lab.kbuild import KernelBuild
from pyvmm.lab.ownkernel import Variant
from tests.unit.kernel_world import World, program


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_the_kernel_is_what_make_built_and_its_manifest_names_the_source(world: World) -> None:
    kernel = world.build()
    assert kernel.path.read_bytes() == b"7.3"
    assert kernel.release == "9.9.1-pyvmm"
    assert kernel.manifest.source[:2] == ("linux-source-7.3", "1")
    assert kernel.manifest.compiler == "gcc 12.2.0"
    assert "CONFIG_KVM=y" in (kernel.directory / "config").read_text()
    assert kernel.is_whole(thorough=True)
    assert {"unpacking the source", "configuring"} <= set(world.steps)
    assert any(step.startswith("compiling") for step in world.steps)


def test_make_gets_the_architecture_and_options_and_a_clean_environment(world: World) -> None:
    world.build()
    for command, variant in zip(world.made, [*Variant, *Variant], strict=True):
        assert re.match(r"-j\d+ ARCH=arm64 ", command)
        assert f"CROSS_COMPILE={ownkernel.CROSS} " in command
        assert re.search(rf" O=\S+/{variant} ", command)
    *configured, host, guest = world.made
    assert all(re.search(r"KCONFIG_ALLCONFIG=/\S+/wanted.config allnoconfig$", command) for command in configured)
    assert host.endswith(" Image")
    assert guest.endswith(" Image")
    environment = (world.home / "environment").read_text()
    assert "LC_ALL=C\n" in environment
    assert not re.search("MAKEFLAGS|KCFLAGS", environment)


def test_only_kernel_and_manifest_and_log_are_kept(world: World) -> None:
    kernel = world.build()
    home = world.cache.directory / "kernels"
    names = ["build.log", "current", "current-guest", kernel.directory.name, world.guest().directory.name]
    assert sorted(path.name for path in home.iterdir()) == sorted(names)
    assert sorted(path.name for path in kernel.directory.iterdir()) == ["Image", "config", "manifest.json"]
    assert not (world.cache.directory / "kernel-partial").exists()


def test_the_second_call_makes_no_request(world: World) -> None:
    kernel = world.build()
    world.offline()
    program(world.bin, "make", "exit 1")
    assert world.build() == kernel


def test_the_kernel_is_rebuilt_for_other_options_but_not_for_other_reasons(world: World) -> None:
    first = world.build()
    world.fragment(
        '# a title\nCONFIG_KVM=y  # host: said better\n\nCONFIG_LOCALVERSION="-x"  # whose\nCONFIG_SLOW=n  # so\n'
    )
    assert world.build() == first
    world.fragment("CONFIG_KVM=y  # why\n")
    second = world.build()
    assert second.directory != first.directory
    assert first.path.exists()  # a lab may be starting from it


def test_each_variant_has_the_common_options_and_its_own(world: World) -> None:
    host, guest = ((kernel.directory / "config").read_text() for kernel in (world.build(), world.guest()))
    for both in (host, guest):
        assert 'CONFIG_LOCALVERSION="-x"\n' in both
    assert ("CONFIG_KVM=y" in host, "CONFIG_SMALL=y" in host) == (True, False)
    assert ("CONFIG_KVM=y" in guest, "CONFIG_SMALL=y" in guest) == (False, True)


def test_a_missing_variant_is_built_and_the_other_is_kept(world: World) -> None:
    host, guest = world.build(), world.guest()
    (world.cache.directory / "kernels" / "current-guest").unlink()
    shutil.rmtree(guest.directory)
    made = len(world.made)
    assert world.build() == host
    assert world.guest().path.read_bytes() == b"7.3"
    assert all(re.search(r" O=\S+/guest ", command) for command in world.made[made:])


def test_a_long_build_still_has_its_source_at_its_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old = world.build()
    monkeypatch.setattr(ownkernel, "GRACE_SECONDS", -1)
    world.compiler("14.1.0")
    new = world.build()
    assert (new.path.exists(), world.guest().path.exists(), old.path.exists()) == (True, True, False)
    assert not (world.cache.directory / "kernels" / "source").exists()


@pytest.mark.parametrize("variant", Variant)
def test_a_request_for_one_variant_does_not_wait_for_the_other(world: World, variant: Variant) -> None:
    built = ownkernel.build_kernels(wanted=[variant], cache=world.cache)
    assert list(built) == [variant]
    assert len(world.made) == 2
    assert all(re.search(rf" O=\S+/{variant} ", command) for command in world.made)
    assert ownkernel.build_kernels(wanted=[variant], cache=world.cache) == built
    assert len(world.made) == 2


def test_a_manifest_older_than_the_guests_kernel_is_understood(world: World) -> None:
    host = world.build()
    path = host.directory / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["steps"]
    path.write_text(json.dumps(manifest))
    assert ownkernel.usable_kernel(world.cache) is not None


def test_progress_is_relative_to_the_last_build_of_all_variants(world: World) -> None:
    shares: list[float] = []
    world.build()
    assert world.guest().manifest.steps == 5
    world.source("7.4")

    def progress(what: str, share: float) -> None:
        if what == "compiling, about 10 files":
            shares.append(share)

    ownkernel.build_kernels(refresh=True, cache=world.cache, progress=progress)
    assert shares == pytest.approx([each / 10 for each in range(1, 10)] + [0.99])


def test_another_compiler_rebuilds_the_kernel_and_the_first_finds_its_kernel_again(world: World) -> None:
    first = world.build()
    world.compiler("14.1.0")
    assert world.build().manifest.compiler == "gcc 14.1.0"
    world.compiler("12.2.0")
    made = len(world.made)
    assert world.build() == first
    assert len(world.made) == made


def test_a_kernel_stays_usable_without_its_compiler(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = world.build()
    monkeypatch.setenv("PATH", str(world.home))
    with pytest.raises(HostError):
        ownkernel.compiler_version()
    assert world.build() == kernel


def test_refresh_builds_a_newer_source_and_does_not_rebuild_the_same(world: World) -> None:
    first = world.build()
    assert world.build(refresh=True) == first
    assert len(world.made) == 4
    world.source("7.4")
    assert world.build() == first
    assert world.build(refresh=True).path.read_bytes() == b"7.4"
    assert world.build().path.read_bytes() == b"7.4"


def test_the_existing_kernel_is_used_offline(world: World) -> None:
    first = world.build()
    world.offline()
    assert world.build(refresh=True) == first
    assert world.steps[-1] == f"offline: using the kernel of {first.manifest.built}"
    first.path.unlink()
    with pytest.raises(AptError):
        world.build(refresh=True)


@pytest.mark.parametrize("damage", [b"", b"7.X"])
def test_a_damaged_kernel_is_noticed_and_rebuilt(world: World, damage: bytes) -> None:
    kernel = world.build()
    kernel.path.write_bytes(damage)
    assert ownkernel.usable_kernel(world.cache, thorough=True) is None
    assert world.build(refresh=True).path.read_bytes() == b"7.3"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"source": 3}', '{"source": ["a", "b", "c"], "more": 1}'])
def test_an_invalid_manifest_means_no_kernel(world: World, text: str) -> None:
    (world.build().directory / "manifest.json").write_text(text)
    assert ownkernel.current_kernel(world.cache) is None


def test_images_can_be_built_while_a_kernel_is_built(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def take(*_: object) -> list[str]:
        with world.cache.lock(lambda: taken.append("waited")):
            taken.append("taken")
        return []

    monkeypatch.setattr(KernelBuild, "configure", take)
    monkeypatch.setattr(KernelBuild, "compile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        world.build()
    assert taken == ["taken", "taken"]
