"""What several unit tests need: rigs in the fake kernel, and a userfaultfd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pyvmm._native import lib
from pyvmm.errors import HostError
from pyvmm.memory.userfault import Userfault
from tests.fake_kvm import Rig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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
