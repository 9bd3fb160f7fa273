# SPDX-License-Identifier: Apache-2.0
"""pyvmm.typed behaves like typing: each test checks both."""

from __future__ import annotations

import copy
import pickle
import typing
from collections.abc import Callable
from typing import Any

import pytest

from pyvmm import typed


class Ours(typed.NamedTuple):
    """A place."""

    x: int
    y: int = 2
    name: str = "here"

    @property
    def far(self) -> bool:
        """Whether it is."""
        return self.x + self.y > 10

    def moved(self, by: int) -> Ours:
        """Return another."""
        return self._replace(x=self.x + by)


class Theirs(typing.NamedTuple):
    """A place."""

    x: int
    y: int = 2
    name: str = "here"

    @property
    def far(self) -> bool:
        """Whether it is."""
        return self.x + self.y > 10

    def moved(self, by: int) -> Theirs:
        """Return another."""
        return self._replace(x=self.x + by)


BOTH = pytest.mark.parametrize("kind", [Ours, Theirs])


@BOTH
def test_a_named_tuple_is_made_by_position_by_name_and_from_defaults(kind: Any) -> None:
    assert kind(1) == kind(1, 2) == kind(x=1) == kind(1, name="here", y=2) == (1, 2, "here")
    assert kind(1) != kind(2)
    assert hash(kind(1)) == hash((1, 2, "here"))
    assert (kind(3, 4).x, kind(3, 4).y, kind(3, 4).name) == (3, 4, "here")
    assert kind._make([1, 2, "there"]) == kind(1, 2, "there")


@BOTH
@pytest.mark.parametrize(
    "make", [lambda kind: kind(), lambda kind: kind(1, x=1), lambda kind: kind(1, z=1), lambda kind: kind(1, 2, "", 4)]
)
def test_a_named_tuple_refuses_missing_duplicate_and_unknown_fields(kind: Any, make: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError):
        make(kind)


@BOTH
def test_a_named_tuple_cannot_be_changed(kind: Any) -> None:
    place = kind(1)
    for name in ("x", "elsewhere"):
        with pytest.raises(AttributeError):
            setattr(place, name, 5)
    assert place == (1, 2, "here")


@BOTH
def test_a_named_tuple_makes_changed_copies(kind: Any) -> None:
    assert kind(1)._replace(y=7) == (1, 7, "here")
    assert type(kind(1)._replace(y=7)) is kind
    with pytest.raises((TypeError, ValueError)):
        kind(1)._replace(z=7)
    assert kind(1)._asdict() == {"x": 1, "y": 2, "name": "here"}
    assert kind(1).moved(9) == (10, 2, "here")
    assert kind(1).moved(9).far


@BOTH
def test_a_named_tuple_describes_itself(kind: Any) -> None:
    assert repr(kind(1)) == f"{kind.__name__}(x=1, y=2, name='here')"
    assert kind.__doc__ == "A place."
    assert kind._fields == ("x", "y", "name")
    assert kind._field_defaults == {"y": 2, "name": "here"}
    assert isinstance(kind(1), tuple)
    match kind(1, 5):
        case kind(x=1, y=found):
            assert found == 5
    x, _, name = kind(1)
    assert (x, name) == (1, "here")


@BOTH
def test_a_named_tuple_is_copied_and_pickled_as_itself(kind: Any) -> None:
    for made in (copy.copy(kind(1)), copy.deepcopy(kind(1)), pickle.loads(pickle.dumps(kind(1)))):
        assert made == kind(1)
        assert type(made) is kind


@typed.checkable
class OurRole(typed.Protocol):
    """Can be asked."""

    @property
    def ready(self) -> bool:
        """Whether it can now."""
        ...

    def ask(self, what: str) -> str:
        """Ask it."""
        ...


@typing.runtime_checkable
class TheirRole(typing.Protocol):
    """Can be asked."""

    @property
    def ready(self) -> bool:
        """Whether it can now."""
        ...

    def ask(self, what: str) -> str:
        """Ask it."""
        ...


class Asked:
    ready = True

    def ask(self, what: str) -> str:
        return what


class Deaf:
    ready = True


@pytest.mark.parametrize("role", [OurRole, TheirRole])
def test_an_object_has_a_role_if_it_has_every_member_of_the_role(role: Any) -> None:
    assert isinstance(Asked(), role)
    assert not isinstance(Deaf(), role)
    assert not isinstance(5, role)


def test_a_value_of_a_new_type_of_int_is_an_int() -> None:
    assert typed.NewType("Metres", int)(5) == 5
