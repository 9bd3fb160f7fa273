# SPDX-License-Identifier: Apache-2.0
"""Sockets that lead into a guest: no other user can connect to one, whatever the umask is, and at no moment."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest

from pyvmm.debug.server import GdbServer
from pyvmm.devices.virtio.vsock import VirtioVsock
from pyvmm.session.control import Control

MAKERS: dict[str, Callable[[str], AbstractContextManager[object]]] = {
    "vsock": lambda path: closing(VirtioVsock(path, 3)),
    "control": lambda path: Control({}, path),
    "gdb": GdbServer,
}


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_socket_is_its_users_own_from_the_moment_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, umask: int
) -> None:
    monkeypatch.delattr(os, "chmod")  # which would come too late
    path = tmp_path / "s"
    before = os.umask(umask)
    try:
        made = MAKERS[kind](str(path))
        with made:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)
