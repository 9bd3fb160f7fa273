"""Rigs in the fake kernel, for the native loop's tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

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
