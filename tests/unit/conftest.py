# SPDX-License-Identifier: Apache-2.0
"""Fixtures of several unit tests: rigs in the fake kernel, a userfaultfd, a virtio device in guest memory, events."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from pyvmm import log
from pyvmm._native import lib
from pyvmm.errors import HostError
from pyvmm.memory.userfault import Userfault
from tests.fake_kvm import Rig
from tests.virtio_board import Board, Toy
from tests.virtqueue_rig import SIZE, Guest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Hypothesis judges what a test does, not how fast this machine does it.
settings.register_profile("pyvmm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pyvmm")


def pytest_itemcollected(item: pytest.Item) -> None:
    # The fork of a process with threads may hang. Python says so from 3.12 on.
    item.add_marker(pytest.mark.filterwarnings("error:This process .* is multi-threaded:DeprecationWarning"))


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(**arguments: Any) -> Rig:
        rigs.append(Rig(**arguments))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig()


@pytest.fixture
def userfault() -> Iterator[Userfault]:
    assert lib.pv_install_signals() == 0
    try:
        opened = Userfault.open(user_mode_only=True)
    except HostError as error:
        pytest.skip(error.message)
    with opened:
        yield opened


@pytest.fixture(scope="module")
def guest_memory() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.fixture
def guest(guest_memory: Guest) -> Guest:
    guest_memory.close_pages(())
    guest_memory.load(bytes(SIZE))
    return guest_memory


@pytest.fixture
def toy(guest: Guest) -> Iterator[Board]:
    board = Board(guest, Toy())
    yield board
    board.device.hold.set()  # type: ignore[attr-defined]
    board.close()


@pytest.fixture
def events() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    stream = io.StringIO()
    log.configure(0, json=True, stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    log.configure(0)
