# SPDX-License-Identifier: Apache-2.0
"""The lab's requirements on this machine, and the command that installs missing ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import HostError
from pyvmm.lab.apt import KEYRING
from pyvmm.lab.lab import require_native
from pyvmm.lab.qemu import find_qemu, require_qemu

STDIO = Path("/usr/include/stdio.h")


@dataclass(frozen=True, slots=True)
class Need:
    """A requirement. ``missing`` says why it is not met, else None. ``package`` has it, if a package does."""

    what: str
    missing: str | None
    package: str | None
    building: bool = False
    """Needed only to build what the lab boots."""


def needs(*, building: bool = True) -> list[Need]:
    """Check everything that the lab needs, in more detail if something has to be built."""
    return [
        # A booting lab asks QEMU for its version itself, and a restored one knows it.
        Need("QEMU", _complaint(require_qemu if building else find_qemu), "qemu-system-arm"),
        Need("the native loop for arm64", _complaint(require_native), None),
        _program("setpriv", "util-linux"),
        *_apt_needs(),
    ]


def _apt_needs() -> list[Need]:
    return [
        _program("apt-get", None, building=True),
        _program("dpkg-deb", "dpkg", building=True),
        Need(
            "Debian's archive keys",
            None if KEYRING.exists() else f"{KEYRING} does not exist",
            "debian-archive-keyring",
            building=True,
        ),
    ]


def kernel_needs() -> list[Need]:
    """Check everything that a build of the project's own kernel needs."""
    from pyvmm.lab.ownkernel import COMPILER, compiler_version

    return [
        *_apt_needs(),
        Need("the compiler for arm64", _complaint(compiler_version), COMPILER, building=True),
        _program("gcc", "gcc", building=True),
        Need("C headers", None if STDIO.exists() else f"{STDIO} does not exist", "libc6-dev", building=True),
        *(_program(name, name, building=True) for name in ("make", "bc", "bison", "flex")),
    ]


def require(*, building: bool) -> None:
    """Raise HostError that names everything missing, with the command that installs it."""
    _refuse((need for need in needs(building=building) if building or not need.building), "the lab's image", "the lab")


def require_for_kernel() -> None:
    """Raise HostError that names everything missing to build the project's kernel, and how to install it."""
    _refuse(kernel_needs(), "the project's own kernel", "building the project's own kernel")


def require_for_make(made: str) -> None:
    """Raise HostError that names everything missing to build the program ``made``, and how to install it."""
    only_the_kernel = ("bc", "bison", "flex")
    _refuse((need for need in kernel_needs() if need.what not in only_the_kernel), made, f"building {made}")


def require_for_packages(made: str) -> None:
    """Raise HostError if Debian's packages, needed for ``made``, cannot be fetched and unpacked."""
    _refuse(_apt_needs(), made, f"fetching {made}")


def _refuse(needs: Iterable[Need], made: str, who: str) -> None:
    lacking = [need for need in needs if need.missing]
    if not lacking:
        return
    if any(need.what == "apt-get" for need in lacking):
        raise HostError(
            f"{made} is made of Debian's packages, and this machine has no apt to fetch them with",
            hint="use Debian or Ubuntu, in a container if need be",
        )
    packages = " ".join(dict.fromkeys(need.package for need in lacking if need.package))
    what = "; ".join(f"{need.what}: {need.missing}" for need in lacking)
    raise HostError(f"{who} needs what is not here: {what}", hint=f"apt install {packages}" if packages else None)


def _complaint(check: Callable[[], object]) -> str | None:
    try:
        check()
    except HostError as error:
        return error.message
    return None


def _program(name: str, package: str | None, *, building: bool = False) -> Need:
    return Need(name, None if shutil.which(name) else f"there is no {name}", package, building)
