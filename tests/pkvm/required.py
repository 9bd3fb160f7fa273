# SPDX-License-Identifier: Apache-2.0
"""What tests of guests need beside the checkout: kernels, programs. Without them tests are skipped; in CI they fail."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from pyvmm.errors import PyvmmError
from pyvmm.guest.kernels import directory


def kernel_directory(name: str) -> Path:
    """Return where the files of ``debian:``, ``own:`` or ``shell:`` are (see pyvmm.guest.kernels)."""
    try:
        return Path(directory(name, _make))
    except PyvmmError as error:
        _lack(str(error))


def program(name: str, package: str) -> str:
    """Return the path of a program from its own package, not of busybox's program of that name."""
    path = shutil.which(name)
    if path is None or Path(path).resolve().name == "busybox":
        _lack(f"there is no {name} here: apt install {package}")
    return path


def _make(name: str) -> str:
    from pyvmm.lab.guests import made

    return made(name)


def _lack(why: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"in CI it must be there: {why}")
    pytest.skip(why)
