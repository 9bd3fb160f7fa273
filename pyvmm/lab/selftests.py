# SPDX-License-Identifier: Apache-2.0
"""The kernel's own KVM selftests, built from Debian's linux-source: three of them, linked statically.

The source is the same as of the project's kernel. The log has the output of the build.
"""

from __future__ import annotations

import re
from pathlib import Path

from pyvmm.lab.apt import Progress, updated_apt
from pyvmm.lab.kbuild import SourceTree
from pyvmm.lab.needs import require_for_make
from pyvmm.lab.ownkernel import SUITES, VARIABLES, compiler_version, download_source, find_source
from pyvmm.lab.trees import Recipe, Scratch, digest_of

NAME = "selftests"
PROGRAMS = ("demand_paging_test", "access_tracking_perf_test", "guest_memfd_test")
DIRECTORY = "tools/testing/selftests/kvm"
HEADERS = "headers"
"""make's headers_install without the copy, for which it wants rsync."""
OPTIONS = {"LDLIBS": "-static -s", "CPPFLAGS": "-DPRINT_PER_VCPU_UPDATES"}
"""Linked for any root; and the tests' own switch to say what each vCPU took, without its thread's start and end."""

# The makefiles of the headers and the tests, and the files that those include.
WANTED = re.compile(
    r"Makefile|Kbuild|scripts/.*|usr/.*|include/(?:uapi|asm-generic)/.*|lib/[^/]*\.c|"
    r"arch/arm64/(?:Makefile|include/.*|tools/.*)|"
    r"tools/(?:include|scripts|build|lib|arch/arm64)/.*|"
    r"tools/testing/selftests/(?:(?:kvm|rseq|cgroup)/.*|lib\.mk|.*\.h)"
)


class SelftestTree(SourceTree):
    """The part of Linux's source that the tests need."""

    made = "the kernel's KVM selftests"

    def _is_wanted(self, name: str) -> bool:
        return WANTED.fullmatch(name) is not None

    def build(self, out: Path, progress: Progress) -> list[Path]:
        """Compile the tests; return the programs, in ``out``. Raises KernelBuildError if that fails."""
        progress("installing the kernel's headers", 0.0)
        self.make(HEADERS, {})
        tests = SelftestTree(self.directory / DIRECTORY, self.log, self._variables)
        programs = [out / name for name in PROGRAMS]
        for number, program in enumerate(programs):
            progress("compiling selftests", number / len(programs))
            tests.make(str(program), {"OUTPUT": str(out), **OPTIONS})
        return programs


def recipe() -> Recipe:
    """Return the recipe of the selftests' tree. Raises HostError without a compiler."""
    return Recipe(NAME, digest_of(PROGRAMS, VARIABLES, OPTIONS, WANTED.pattern, compiler_version()), _make)


def _make(scratch: Scratch, progress: Progress) -> str:
    require_for_make(SelftestTree.made)
    with scratch.cache.lock(lambda: progress("waiting for another build", 0.0)):
        apt = updated_apt(scratch.cache.apt, SUITES, refresh=False, progress=progress)
        progress("resolving packages", 0.0)
        source = find_source(apt)
        package = download_source(apt, source, scratch.downloads, progress)
    scratch.log.write_text(f"{source.name} {source.version}, {compiler_version()}\n")
    tree = SelftestTree(scratch.work / "linux", scratch.log, VARIABLES)
    tree.unpack(package, progress)
    built = scratch.work / "built"
    built.mkdir()
    for program in tree.build(built, progress):
        program.rename(scratch.tree / program.name)
    return f"{source.name} {source.version}"
