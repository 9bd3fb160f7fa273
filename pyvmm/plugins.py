# SPDX-License-Identifier: Apache-2.0
"""What installed packages bring: devices, claims and benchmark cases, by entry point.

A package names what it brings in its pyproject.toml::

    [project.entry-points."pyvmm.devices"]
    dice = "pyvmm_dice:KIND"

Whoever keeps a registry looks there first, and asks here only about a name that is not built in, or for a list::

    found = BUILT_IN.get(name) or plugins.find(plugins.DEVICES, name, DeviceKind)  # None: nobody has that name
    brought, faults = plugins.every(plugins.CLAIMS, Claim, taken=BUILT_IN)  # a list: the good ones, then the faults

``kind`` is the class of what the entry point leads to. Something wrong with a plug-in is a ``PluginError``: one line
with its name, its package and the reason. ``find`` raises it, ``every`` and ``names`` return them beside the good ones:
print ``error.message``.

Under ``--lab`` the lab sees the packages that were asked about here before it booted, and no others (``asked``). So a
verb that runs there must have called ``find``, ``names`` or ``every`` on the workstation, while its command line is
parsed or in its ``main_in_lab``; it asks again inside.

Reading entry points costs 219 million instructions, so a run of known names never calls this module, and importlib's
reader is imported in its functions. It owns the list of the packages asked about, which only grows. Any thread may
call.
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
    """A plug-in cannot be used: ``name`` is what it is called, ``package`` who brings it."""

    def __init__(self, name: str, package: str, reason: str) -> None:
        what = f"the plug-in {name!r} of the package {package} cannot be used: {reason}"
        super().__init__(what, hint=f"mend or remove it: pip uninstall {package.partition(' ')[0]}")
        self.name = name
        self.package = package


class Plugin(Generic[T]):
    """What an entry point led to: ``item`` is called ``name``, and ``package`` brings it."""

    __slots__ = ("item", "name", "package")

    def __init__(self, name: str, package: str, item: T) -> None:
        self.name = name
        self.package = package
        self.item = item

    def fault(self, reason: str) -> PluginError:
        """Return the error that says why this cannot be used after all."""
        return PluginError(self.name, self.package, reason)


def find(group: str, name: str, kind: type[T]) -> T | None:
    """Load and return what is called ``name`` in ``group``; None if no installed package brings it.

    PluginError if it cannot be loaded, is not a ``kind``, or two packages bring it; also if nobody brings it but a
    package with entry points in the group cannot be read.
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
    """Return the names in ``group`` with the packages that bring them, nothing loaded, and what cannot be read."""
    found, faults = _read(group)
    listed = {}
    for name, entries in sorted(found.items()):
        for distribution, _ in entries:
            _note(distribution)
        listed[name] = " and ".join(package_name(distribution) for distribution, _ in entries)
    return listed, faults


def every(group: str, kind: type[T], *, taken: Container[str] = ()) -> tuple[list[Plugin[T]], list[PluginError]]:
    """Load everything in ``group``, by name; return what can be used, and a fault for each of the others.

    ``taken`` are the names that are built in: a plug-in cannot take one, as nothing would ever ask it.
    """
    found, faults = _read(group)
    good = []
    for name, entries in sorted(found.items()):
        for distribution, _ in entries:
            _note(distribution)
        if name in taken:
            faults += [
                PluginError(name, package_name(each), "pyvmm has one of that name itself") for each, _ in entries
            ]
            continue
        try:
            good.append(_load(name, entries, kind))
        except PluginError as fault:
            faults.append(fault)
    return good, faults


def asked() -> list[Distribution]:
    """Return the packages that a name was found in or a list was made of, in this process, by name."""
    return [_asked[name] for name in sorted(_asked)]


def _note(distribution: Distribution) -> None:
    _asked[package_name(distribution)] = distribution


def package_name(distribution: Distribution) -> str:
    """Return what a package is called, also where it lacks its metadata."""
    try:
        metadata = distribution.metadata
        name = metadata["Name"] if "Name" in metadata else None
    except Exception:  # whatever a damaged file makes the reader raise
        name = None
    return name or _stem(distribution)


def _stem(distribution: Distribution) -> str:
    """Return a package's name as the directory of its metadata has it: that is always known, and read cheaply."""
    directory = str(getattr(distribution, "_path", "unknown")).rpartition("/")[2]
    return directory.rpartition(".")[0].partition("-")[0].lower()


def _read(group: str) -> tuple[dict[str, list[tuple[Distribution, EntryPoint]]], list[PluginError]]:
    """Return who brings what in ``group``, by name, and a fault for each package that cannot be read."""
    from importlib import metadata

    found: dict[str, list[tuple[Distribution, EntryPoint]]] = {}
    faults = []
    seen = set()
    for distribution in metadata.distributions():
        stem = _stem(distribution)
        if stem in seen:  # of two on the path the first is imported
            continue
        seen.add(stem)
        try:
            text = distribution.read_text("entry_points.txt") or ""
            if group not in text:
                continue
            entries = [entry for entry in distribution.entry_points if entry.group == group]
        except Exception as error:  # every package of the machine is read here, also those that nobody asked about
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
        raise PluginError(name, package, "it is brought more than once")
    [(_, entry)] = entries
    if not entry.pattern.match(entry.value):
        raise PluginError(name, package, f"{entry.value!r} is not MODULE:NAME")
    try:
        item = entry.load()
    except (Exception, SystemExit) as error:  # it runs somebody's module, which may raise anything
        raise PluginError(name, package, _reason(error)) from error
    if not isinstance(item, kind):
        raise PluginError(name, package, f"{entry.value} is a {type(item).__name__}, not a {kind.__name__}")
    return Plugin(name, package, item)


def _reason(error: BaseException) -> str:
    """Return one line that says what was raised."""
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
