# SPDX-License-Identifier: Apache-2.0
"""Define benchmark cases, list them, and choose the points to measure.

A case is a function of one :class:`pyvmm.bench.measure.Bench`, in its own module. Its axes define the points that can
be measured. The first value of each axis is the *base*. By default a star around the base is measured: every value of
every axis, one axis at a time, in every protection. A decorator makes a case:

    @case(says="...", axes={"protection": PROTECTIONS, "access": ("read", "write")}, quick=("access",))
    def fault(bench): ...

An installed package may add a case. Its entry point in ``pyvmm.cases`` has the case's name, and the case is its target.
Owns only the registry, which importing the modules in ``pyvmm.bench.cases`` fills.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyvmm import plugins
from pyvmm.bench.model import Point, Value
from pyvmm.errors import UsageError
from pyvmm.experiment.registry import Registry, choose, nearest
from pyvmm.guest.kernels import is_kernel
from pyvmm.plugins import PluginError

if TYPE_CHECKING:
    from pyvmm.bench.measure import Bench

DEADLINE = 120.0
"""Default deadline of a point in seconds. Its process is then killed."""

Function = Callable[["Bench"], None]
Axes = Mapping[str, tuple[Value, ...]]


@dataclass(frozen=True, slots=True)
class Case:
    """A benchmark case. ``extra`` are points besides the star, given as differences from the base."""

    name: str
    says: str
    axes: Axes
    function: Function
    quick: tuple[str, ...] | None
    """The axes that the quick set varies; None if the quick set omits this case."""
    extra: tuple[Point, ...]
    nonsense: Callable[[Point], str]
    """Returns why a point is invalid; empty for a valid one."""
    seconds: float = DEADLINE
    kernel: str = ""
    """The named kernel that its guests need, unless an axis ``kernel`` selects it."""

    def kernels(self, point: Mapping[str, Value]) -> list[str]:
        """Return the named kernels that a point needs."""
        kernel = str(point.get("kernel", self.kernel))
        return [kernel] if is_kernel(kernel) else []

    @property
    def base(self) -> Point:
        """The first value of every axis."""
        return {axis: values[0] for axis, values in self.axes.items()}

    def points(self, *, quick: bool = False) -> list[Point]:
        """Return the star around the base, in every protection."""
        if quick and self.quick is None:
            return []
        axes = (self.quick or ()) if quick else tuple(self.axes)
        stars: list[Point] = [{}, *({axis: value} for axis in axes for value in self.axes[axis][1:])]
        stars += [] if quick else self.extra
        found: list[Point] = []
        for protection in self.axes.get("protection", (None,)):
            own: Point = {} if protection is None else {"protection": protection}
            for star in stars:
                point = {**self.base, **own, **star}
                if point not in found and not self.nonsense(point):
                    found.append(point)
        return found

    def cross(self, chosen: Mapping[str, Sequence[Value]]) -> list[Point]:
        """Return every combination of the values chosen, the other axes at their base.

        Raises UsageError for an unknown axis or value, with the nearest known one, and if no combination is valid.
        """
        axes = {axis: [self._value(axis, value) for value in values] for axis, values in chosen.items()}
        points = [{**self.base, **dict(zip(axes, values, strict=True))} for values in itertools.product(*axes.values())]
        whys = [self.nonsense(point) for point in points]
        if points and all(whys):
            raise UsageError(f"nothing of {self.name} to measure: {whys[0]}")
        return [point for point, why in zip(points, whys, strict=True) if not why]

    def check(self, point: Mapping[str, Value]) -> Point:
        """Complete ``point``, given by some of its axes. Raises UsageError as :meth:`cross` does."""
        [whole] = self.cross({axis: [value] for axis, value in point.items()})
        return whole

    def _value(self, axis: str, value: Value) -> Value:
        """Convert ``value``, possibly text, to a value of an axis. Numbers need not be listed ones."""
        if axis not in self.axes:
            raise UsageError(f"{self.name} has no axis {axis!r}", hint=nearest(axis, self.axes))
        known = self.axes[axis]
        for each in known:
            if value == each or str(value) == str(each):
                return each
        if all(isinstance(each, int) for each in known):
            number = int(str(value)) if str(value).isdecimal() else 0
            if number > 0:
                return number
            raise UsageError(f"{axis} of {self.name} is a number above 0, not {value!r}")
        hint = nearest(str(value), map(str, known))
        raise UsageError(f"{axis} of {self.name} is never {value!r}", hint=hint)


REGISTRY: Final = Registry(Case, "pyvmm.bench.cases", plugins.CASES)


def case(
    *,
    says: str,
    axes: Axes,
    quick: tuple[str, ...] | None = (),
    extra: tuple[Point, ...] = (),
    nonsense: Callable[[Point], str] = lambda _: "",
    seconds: float = DEADLINE,
    kernel: str = "",
) -> Callable[[Function], Case]:
    """Make a function the case of its name.

    ``says`` is its statement in a sentence. ``axes`` has the values of each axis, the base first. ``quick`` names the
    axes that ``--quick`` varies; None omits the case there. ``extra`` are more points, as differences from the base.
    ``nonsense`` returns why a point is invalid, or an empty text. A point that takes longer than ``seconds`` is killed.
    ``kernel`` is the named kernel that its guests need.
    """
    return lambda function: Case(function.__name__, says, axes, function, quick, extra, nonsense, seconds, kernel)


def all_cases() -> dict[str, Case]:
    """Import the modules of built-in cases and return their cases by name."""
    return REGISTRY.built_in()


def brought_cases() -> tuple[list[Case], list[PluginError]]:
    """Return the cases of installed packages, and the faults of unusable ones."""
    return REGISTRY.plug_ins()


def select(names: Iterable[str]) -> list[Case]:
    """Return the cases of these names; without names all built-in ones, so that runs of two hosts are comparable.

    Raises UsageError for an unknown one, with the nearest known, and PluginError where the package that brings it
    cannot be used.
    """
    known = all_cases()
    names = list(names) or list(known)
    return choose(names, {name: [each] for name, each in known.items()}, _brought, _unknown)


def _brought(name: str) -> list[Case]:
    found = REGISTRY.plug_in(name)
    return [] if found is None else [found]


def _unknown(name: str) -> UsageError:
    brought, faults = brought_cases()
    hint = nearest(name, [*all_cases(), *(each.name for each in brought)])
    return UsageError(f"no case is called {name!r}", hint="; ".join([hint, *(fault.message for fault in faults)]))
