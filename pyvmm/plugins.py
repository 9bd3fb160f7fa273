# SPDX-License-Identifier: Apache-2.0
"""Find plug-ins of installed packages: devices, claims and benchmark cases, by entry point.

A package lists its plug-ins in its pyproject.toml::

    [project.entry-points."pyvmm.devices"]
    dice = "pyvmm_dice:KIND"

A registry looks up its own names first. It calls this module only for other names, or for a list::

    found = BUILT_IN.get(name) or plugins.find(plugins.DEVICES, name, DeviceKind)  # None: nobody has that name
    brought, faults = plugins.every(plugins.CLAIMS, Claim, taken=BUILT_IN)  # a list: the good ones, then the faults

``kind`` is the class of the entry point's target. A faulty plug-in is a ``PluginError``: one line with its name, its
package and the reason. ``find`` raises it. ``every`` and ``names`` return it beside the usable ones: print
``error.message``.

A lab sees only the packages that were looked up on the workstation before it booted (``asked``). So a verb that runs in
the lab must call ``find``, ``names`` or ``every`` on the workstation, while its command line is parsed or in its
``main_in_lab``. It looks them up again inside.

Reading entry points costs 219 million instructions. So a run with built-in names never calls this module, and its
functions import importlib's reader. It owns the list of looked-up packages, which only grows. Any thread may call it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from pyvmm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Container
    from importlib.metadata import Distribution, EntryPoint

DEVICES = "pyvmm.devices"
CLAIMS = "pyvmm.claims"
CASES = "pyvmm.cases"

T = TypeVar("T")

_asked: dict[str, Distribution] = {}


class PluginError(UsageError):
    """A plug-in cannot be used. ``name`` is its name, ``package`` its package."""

    def __init__(self, name: str, package: str, reason: str) -> None:
        what = f"the plug-in {name!r} of the package {package} cannot be used: {reason}"
        super().__init__(what, hint=f"fix or remove it: pip uninstall {package.partition(' ')[0]}")
        self.name = name
        self.package = package


class Plugin(Generic[T]):
    """A loaded plug-in: the object ``item`` with the name ``name``, of the package ``package``."""

    __slots__ = ("item", "name", "package")

    def __init__(self, name: str, package: str, item: T) -> None:
        self.name = name
        self.package = package
        self.item = item

    def fault(self, reason: str) -> PluginError:
        """Return the error for a plug-in that cannot be used for this reason."""
        return PluginError(self.name, self.package, reason)


def find(group: str, name: str, kind: type[T]) -> T | None:
    """Load and return the plug-in ``name`` of ``group``; None if no installed package has it.

    Raises PluginError if it cannot be loaded, is not a ``kind``, or is in two packages. Also raises it if the name is
    unknown and a package with entry points in the group cannot be read.
    """
    found, unreadable = _read(group)
    entries = found.get(name, [])
    if not entries:
        if unreadable:
            raise unreadable[0]
        return None
    for distribution, _ in entries:
        _note(distribution)
    return _load(name, entries, kind).item


def names(group: str) -> tuple[dict[str, str], list[PluginError]]:
    """Return the names in ``group`` with their packages, without loading them, and the faults of unreadable ones."""
    found, faults = _read(group)
    listed = {}
    for name, entries in sorted(found.items()):
        for distribution, _ in entries:
            _note(distribution)
        listed[name] = " and ".join(package_name(distribution) for distribution, _ in entries)
    return listed, faults


def every(group: str, kind: type[T], *, taken: Container[str] = ()) -> tuple[list[Plugin[T]], list[PluginError]]:
    """Load all plug-ins of ``group``, by name. Returns the usable ones, and a fault for each of the others.

    ``taken`` are the built-in names. A plug-in with such a name would never be used, and is a fault.
    """
    found, faults = _read(group)
    good = []
    for name, entries in sorted(found.items()):
        for distribution, _ in entries:
            _note(distribution)
        if name in taken:
            faults += [
                PluginError(name, package_name(each), "pyvmm has a built-in one with this name") for each, _ in entries
            ]
            continue
        try:
            good.append(_load(name, entries, kind))
        except PluginError as fault:
            faults.append(fault)
    return good, faults


def asked() -> list[Distribution]:
    """Return the packages that this process has found a name in or listed, by name."""
    return [_asked[name] for name in sorted(_asked)]


def _note(distribution: Distribution) -> None:
    _asked[package_name(distribution)] = distribution


def package_name(distribution: Distribution) -> str:
    """Return a package's name, even without its metadata."""
    try:
        metadata = distribution.metadata
        name = metadata["Name"] if "Name" in metadata else None  # noqa: SIM401 (its type has no get)
    except Exception:  # any exception that a damaged file causes in the reader
        name = None
    return name or _stem(distribution)


def _stem(distribution: Distribution) -> str:
    """Return a package's name from its metadata directory, which is always known and cheap to read."""
    directory = str(getattr(distribution, "_path", "unknown")).rpartition("/")[2]
    return directory.rpartition(".")[0].partition("-")[0].lower()


def _read(group: str) -> tuple[dict[str, list[tuple[Distribution, EntryPoint]]], list[PluginError]]:
    """Return the entry points of ``group`` by name, and a fault for each unreadable package."""
    from importlib import metadata

    found: dict[str, list[tuple[Distribution, EntryPoint]]] = {}
    faults = []
    seen = set()
    for distribution in metadata.distributions():
        stem = _stem(distribution)
        if stem in seen:  # of two versions on the path, the first is imported
            continue
        seen.add(stem)
        try:
            text = distribution.read_text("entry_points.txt") or ""
            if group not in text:
                continue
            entries = [entry for entry in distribution.entry_points if entry.group == group]
        except Exception as error:  # this reads every package of the machine, also unrelated ones
            if isinstance(error, UnicodeDecodeError) and group.encode() not in error.object:
                continue
            faults.append(PluginError(group, package_name(distribution), f"entry_points.txt: {_reason(error)}"))
            continue
        for entry in entries:
            found.setdefault(entry.name, []).append((distribution, entry))
    return found, faults


def _load(name: str, entries: list[tuple[Distribution, EntryPoint]], kind: type[T]) -> Plugin[T]:
    package = " and ".join(package_name(distribution) for distribution, _ in entries)
    if len(entries) > 1:
        raise PluginError(name, package, "it is defined more than once")
    [(_, entry)] = entries
    if not entry.pattern.match(entry.value):
        raise PluginError(name, package, f"{entry.value!r} is not MODULE:NAME")
    try:
        item = entry.load()
    except (Exception, SystemExit) as error:  # it runs a foreign module, which may raise anything
        raise PluginError(name, package, _reason(error)) from error
    if not isinstance(item, kind):
        raise PluginError(name, package, f"{entry.value} is a {type(item).__name__}, not a {kind.__name__}")
    return Plugin(name, package, item)


def _reason(error: BaseException) -> str:
    """Return one line for an exception."""
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
