# SPDX-License-Identifier: Apache-2.0
"""A registry of named objects: groups of claims and benchmark cases, built in or from installed packages.

A built-in object is a top-level value of a module in one package. A plug-in object is the target of an entry point of
an installed package. Entry points are read only for a name that is not built in, and for a list of all objects.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from pyvmm import plugins
from pyvmm.errors import UsageError
from pyvmm.plugins import PluginError


class Named(Protocol):
    """An object of a registry."""

    @property
    def name(self) -> str:
        """Its name, also that of its entry point."""
        ...


N = TypeVar("N", bound=Named)
T = TypeVar("T")


class Registry(Generic[N]):
    """All objects of ``kind``: those in the modules of ``package``, and those of the entry points ``entry_points``."""

    def __init__(self, kind: type[N], package: str, entry_points: str) -> None:
        self._kind, self._package, self._entry_points = kind, package, entry_points
        self._built_in: dict[str, N] = {}
        self._modules: set[str] = set()
        """The modules imported and searched so far."""

    def built_in(self, begins: tuple[str, ...] = ("",)) -> dict[str, N]:
        """Import the modules whose names begin with one of ``begins``. Returns the built-in objects so far, by name.

        Raises ValueError if two have the same name.
        """
        package = importlib.import_module(self._package)
        for info in pkgutil.iter_modules(package.__path__):
            if info.name.startswith(begins) and info.name not in self._modules:
                self._modules.add(info.name)
                for value in vars(importlib.import_module(f"{self._package}.{info.name}")).values():
                    if isinstance(value, self._kind):
                        self._add(value)
        return self._built_in

    def _add(self, value: N) -> None:
        if self._built_in.setdefault(value.name, value) is not value:
            raise ValueError(f"two {self._kind.__name__.lower()}s are called {value.name}")

    def plug_in(self, name: str) -> N | None:
        """Return the object ``name`` of an installed package. Raises PluginError if it cannot be used."""
        found = plugins.find(self._entry_points, name, self._kind)
        if found is not None and found.name != name:
            package = plugins.names(self._entry_points)[0][name]
            raise PluginError(name, package, f"its target is called {found.name!r}")
        return found

    def plug_ins(self) -> tuple[list[N], list[PluginError]]:
        """Return all objects of installed packages, and the faults of unusable ones."""
        brought, faults = plugins.every(self._entry_points, self._kind, taken=self.built_in())
        for each in brought:
            if each.item.name != each.name:
                faults.append(each.fault(f"its target is called {each.item.name!r}"))
        return [each.item for each in brought if each.item.name == each.name], faults


def choose(
    names: Iterable[str],
    known: Mapping[str, Sequence[T]],
    brought: Callable[[str], Sequence[T]],
    refuse: Callable[[str], UsageError],
) -> list[T]:
    """Return the objects of the names, in this order, each once.

    ``known`` has the built-in objects under all their names. ``brought`` looks up other names. For an unknown name, the
    error from ``refuse`` is raised.
    """
    found: list[T] = []
    for name in names:
        some = known.get(name) or brought(name)
        if not some:
            raise refuse(name)
        found += [each for each in some if each not in found]
    return found


def nearest(name: str, known: Iterable[str], *, offers: Mapping[str, str] | None = None, otherwise: str = "") -> str:
    """Return a hint with the known names closest to ``name``; without any, ``otherwise`` or all known names.

    ``offers`` maps names to the text shown instead.
    """
    names, offers = list(known), offers or {}
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    parts = dict.fromkeys(offers.get(each, each) for each in names if name and name in each)
    said = dict.fromkeys([*(offers.get(each, each) for each in near), *list(parts)[:3]])
    if said:
        return f"the nearest: {', '.join(said)}"
    return otherwise or f"known are {', '.join(names)}"
