"""What this machine must have for the lab, and the one line that installs what it has not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass

from pyvmm.errors import HostError
from pyvmm.lab.apt import KEYRING
from pyvmm.lab.lab import require_native
from pyvmm.lab.qemu import require_qemu


@dataclass(frozen=True, slots=True)
class Need:
    """One thing; ``missing`` says why it does not do, None where it does. ``package`` brings it, if one does."""

    what: str
    missing: str | None
    package: str | None
    building: bool = False
    """Needed only to build the image."""


def needs() -> list[Need]:
    """Look for everything the lab needs."""
    return [
        Need("QEMU", _complaint(require_qemu), "qemu-system-arm"),
        Need("the native loop for arm64", _complaint(require_native), None),
        _program("setpriv", "util-linux"),
        _program("apt-get", None, building=True),
        _program("dpkg-deb", "dpkg", building=True),
        Need(
            "Debian's archive keys",
            None if KEYRING.exists() else f"{KEYRING} does not exist",
            "debian-archive-keyring",
            building=True,
        ),
    ]


def require(*, building: bool) -> None:
    """HostError naming all that is missing at once, with the line that installs it."""
    lacking = [need for need in needs() if need.missing and (building or not need.building)]
    if not lacking:
        return
    if any(need.what == "apt-get" for need in lacking):
        raise HostError("the lab's image is made of Debian's packages, and this machine has no apt to fetch them with",
                        hint="use Debian or Ubuntu, in a container if need be")  # fmt: skip
    packages = " ".join(need.package for need in lacking if need.package)
    what = "; ".join(f"{need.what}: {need.missing}" for need in lacking)
    raise HostError(f"the lab needs what is not here: {what}", hint=f"apt install {packages}" if packages else None)


def _complaint(check: Callable[[], object]) -> str | None:
    try:
        check()
    except HostError as error:
        return error.message
    return None


def _program(name: str, package: str | None, *, building: bool = False) -> Need:
    return Need(name, None if shutil.which(name) else f"there is no {name}", package, building)
