# SPDX-License-Identifier: Apache-2.0
"""What goes by a name: groups of claims and benchmark cases, built in or brought by an installed package.

Something built in is a value at the top of a module in one package. Something brought is what an entry point of an
installed package leads to. Entry points are read only for a name that is not built in, and for a list of all there is.
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
    """What a registry holds."""

    @property
    def name(self) -> str:
        """What it goes by; an entry point that leads to it has the same name."""
        ...


N = TypeVar("N", bound=Named)
T = TypeVar("T")


class Registry(Generic[N]):
    """All values of ``kind``: those in the modules of ``package``, and those of the entry points ``entry_points``."""

    def __init__(self, kind: type[N], package: str, entry_points: str) -> None:
        self._kind, self._package, self._entry_points = kind, package, entry_points
        self._built_in: dict[str, N] = {}
        self._modules: set[str] = set()
        """Those imported and looked through."""

    def built_in(self, begins: tuple[str, ...] = ("",)) -> dict[str, N]:
        """Import the modules whose names begin with one of ``begins``; return what is built in and imported, by name.

        Raises ValueError where two have one name.
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
        """Return what an installed package brings under ``name``; PluginError where that cannot be used."""
        found = plugins.find(self._entry_points, name, self._kind)
        if found is not None and found.name != name:
            package = plugins.names(self._entry_points)[0][name]
            raise PluginError(name, package, f"what it leads to is called {found.name!r}")
        return found

    def plug_ins(self) -> tuple[list[N], list[PluginError]]:
        """Return all that installed packages bring, and why some of it cannot be used."""
        brought, faults = plugins.every(self._entry_points, self._kind, taken=self.built_in())
        for each in brought:
            if each.item.name != each.name:
                faults.append(each.fault(f"what it leads to is called {each.item.name!r}"))
        return [each.item for each in brought if each.item.name == each.name], faults


def choose(
    names: Iterable[str],
    known: Mapping[str, Sequence[T]],
    brought: Callable[[str], Sequence[T]],
    refuse: Callable[[str], UsageError],
) -> list[T]:
    """Return what each name asks for, in this order and each once.

    ``known`` has what is built in, by every name it goes by. ``brought`` is asked for what else goes by a name; where
    that is nothing, what ``refuse`` makes of the name is raised.
    """
    found: list[T] = []
    for name in names:
        some = known.get(name) or brought(name)
        if not some:
            raise refuse(name)
        found += [each for each in some if each not in found]
    return found


def nearest(name: str, known: Iterable[str], *, offers: Mapping[str, str] | None = None, otherwise: str = "") -> str:
    """Say which known names are like ``name``; where none is, ``otherwise``, or which names are known.

    ``offers`` has what is said in place of a name, where that is another.
    """
    names, offers = list(known), offers or {}
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    parts = dict.fromkeys(offers.get(each, each) for each in names if name and name in each)
    said = dict.fromkeys([*(offers.get(each, each) for each in near), *list(parts)[:3]])
    if said:
        return f"the nearest: {', '.join(said)}"
    return otherwise or f"known are {', '.join(names)}"
