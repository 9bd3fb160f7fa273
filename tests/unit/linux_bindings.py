# SPDX-License-Identifier: Apache-2.0
"""Linux's bindings for device trees, for dt-validate: from Debian's linux-doc, fetched once and then cached.

Most of them are GPL-2.0-only, so the repository has no copy.
"""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final, NoReturn

import pytest

from pyvmm.errors import PyvmmError
from pyvmm.lab.apt import Progress, updated_apt
from pyvmm.lab.cache import Cache, cache_directory
from pyvmm.lab.ownkernel import SUITES, download_source
from pyvmm.lab.rootfs import open_package
from pyvmm.lab.trees import Recipe, Scratch, digest_of, made_tree

PACKAGE: Final = "linux-doc"
FILE: Final = re.compile(r".*/Documentation/devicetree/bindings/(.*)\.yaml(\.gz)?")
NAMES: Final = (
    "arm/cpus",
    "arm/pmu",
    "arm/primecell",
    "arm/psci",
    "clock/fixed-clock",
    "interrupt-controller/arm,gic-v3",
    "opp/opp-v1",
    "rng/microsoft,vmgenid",
    "rtc/arm,pl031",
    "rtc/rtc",
    "serial/pl011",
    "serial/serial",
    "timer/arm,arch_timer",
    "virtio/mmio",
)
"""What speaks of nodes that the machine has, and what those refer to. dt-schema itself has memory, CPUs, /chosen and
/reserved-memory with its pools."""


def recipe() -> Recipe:
    """Return the recipe for the directory of bindings."""
    return Recipe("bindings", digest_of(PACKAGE, NAMES), _make)


def _make(scratch: Scratch, progress: Progress) -> str:
    lab = Cache()
    with lab.lock(lambda: progress("waiting for another build", 0.0)):
        apt = updated_apt(lab.apt, SUITES, refresh=False, progress=progress)
        newest = [pair for pair in apt.resolve(PACKAGE, suite=SUITES[-1]) if re.match(rf"{PACKAGE}-\d", pair[0])]
        [source] = apt.locate(newest[:1])
        package = download_source(apt, source, scratch.downloads, progress)
    wanted: set[str] = set(NAMES)
    with open_package(package) as files:
        for file in files:
            if (name := FILE.fullmatch(file.name)) and name[1] in wanted and (content := files.extractfile(file)):
                data = content.read()
                path = scratch.tree / f"{name[1]}.yaml"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(gzip.decompress(data) if name[2] else data)
                wanted.remove(name[1])
    assert not wanted, f"{source.file} has no binding for {', '.join(sorted(wanted))}"
    return f"{source.name} {source.version}"


def complaints(*trees: Path) -> list[str]:
    """Return dt-validate's complaints about flattened trees, a line each. Skips the test if dt-validate is missing.

    In CI the test fails instead.
    """
    program = Path(sys.executable).with_name("dt-validate")
    if not program.exists():
        _lack("dt-validate is not installed: pip install dtschema")
    try:
        # Not in the lab's cache: a build of the project's kernel locks it, and tests would wait.
        bindings = made_tree(recipe(), cache=Cache(cache_directory().with_name("tests")))
    except PyvmmError as error:
        _lack(f"Linux's bindings cannot be had: {error}")
    done = subprocess.run(
        [program, "-s", bindings, *trees],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"},
    )
    said = re.split(r"\n(?!\t)", (done.stdout + done.stderr).strip("\n"))
    # Ignore complaints about the bindings: they refer to bindings that are not in the package.
    return [" ".join(each.split()) for each in said if each and not each.startswith(f"{bindings}/")]


def _lack(why: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"in CI it must be there: {why}")
    pytest.skip(why)
