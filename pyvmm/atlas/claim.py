# SPDX-License-Identifier: Apache-2.0
"""Define claims and groups, and list all claims.

A claim is a function of one :class:`~pyvmm.experiment.Experiment`. Its docstring is the statement; what it
checks decides whether that holds. A module of claims names its group once:

    claim = group("share")

    @claim(pkvm="memfd", emulated="memfd", origin="thread: Quentin Perret, ...")
    def contents_are_kept(x):
        \"\"\"What the guest wrote before a share, the host reads after it.\"\"\"
        page = x.page()
        x.guest.write64(page, 42)
        x.guest.share(page)
        x.check("the host reads", x.host64(page), 42)

An installed package may add a group of claims. Its entry point in ``pyvmm.claims`` has the group's name, and its target
is the result of :func:`group`. A new group needs a heading:

    claim = group("mine", heading="What my driver does to guest memory")

The modules in ``pyvmm.atlas.claims`` fill the built-in groups when they are imported. Owns nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pyvmm import plugins
from pyvmm.errors import UsageError
from pyvmm.experiment.registry import Registry, choose, nearest
from pyvmm.plugins import PluginError
from pyvmm.protection import Protection

if TYPE_CHECKING:
    from pyvmm.experiment import Experiment

DEADLINE = 60.0
"""Default deadline of an experiment in seconds. Its process is then killed."""

Function = Callable[["Experiment"], None]


@dataclass(frozen=True, slots=True)
class Place:
    """A place to try a claim in: a protection, and the backing of guest memory."""

    protection: Protection
    backing: str

    def __str__(self) -> str:
        return f"{self.protection.value}/{self.backing}"


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement about the kernel, and its experiment."""

    id: str
    group: str
    says: str
    origin: str
    places: tuple[Place, ...]
    function: Function
    seconds: float = DEADLINE
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of its Experiment, besides the place."""
    heading: str = ""
    """The heading of its group."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names that select it: its id, the id without the group, and the group."""
        return self.id, self.id.partition("/")[2], self.group


class Group:
    """Claims about one subject, with a name and a heading. Calling it returns the decorator of its claims."""

    def __init__(self, name: str, heading: str) -> None:
        self.name, self.heading = name, heading
        self.claims: dict[str, Claim] = {}
        """By id, in the order of the modules and of the functions in them."""

    def __call__(
        self,
        *,
        origin: str,
        none: str = "",
        emulated: str = "",
        pkvm: str = "",
        seconds: float = DEADLINE,
        **options: Any,
    ) -> Callable[[Function], Claim]:
        """Make a function a claim of the group. Each protection lists the backings to try it over."""
        wanted = {Protection.NONE: none, Protection.EMULATED: emulated, Protection.PKVM: pkvm}
        places = tuple(Place(protection, backing) for protection, text in wanted.items() for backing in text.split())

        def make(function: Function) -> Claim:
            id = f"{self.name}/{function.__name__.replace('_', '-')}"
            if id in self.claims:
                raise ValueError(f"two claims are called {id}")
            if not places:
                raise ValueError(f"{id} is tried nowhere")
            says = " ".join(inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].split())
            self.claims[id] = Claim(id, self.name, says, origin, places, function, seconds, options, self.heading)
            return self.claims[id]

        return make


GROUPS: Final[Mapping[str, Group]] = {
    name: Group(name, heading)
    for name, heading in {
        "fault-in": "How pages get into the guest",
        "ownership": "Who can still touch a page",
        "share": "What a share and an unshare do",
        "conversion": "What conversions do to contents",
        "private-fd": "What guest_memfd and holes in it mean",
        "lazy": "Memory that is provided late",
        "huge": "Huge pages",
        "fatal": "What is refused, and what is final",
        "teardown": "What the end leaves behind",
    }.items()
}
"""The built-in groups in the order they are reported in."""

REGISTRY: Final = Registry(Group, "pyvmm.atlas.claims", plugins.CLAIMS)


def group(name: str, heading: str = "") -> Group:
    """Return the built-in group ``name``, or a new one with ``heading``.

    Raises ValueError for an unknown name without ``heading``, and for a built-in one with it.
    """
    if heading:
        if name in GROUPS:
            raise ValueError(f"a group called {name!r} already exists")
        return Group(name, heading)
    if name not in GROUPS:
        raise ValueError(f"no group is called {name!r}")
    return GROUPS[name]


def all_claims(names: Iterable[str] = ()) -> list[Claim]:
    """Import the modules of built-in claims and return their claims, group by group.

    If all ``names`` contain their group, only these groups' modules are imported: a module's name starts with its
    group's. Entry points are not read. A run without names has only the built-in claims, so that results of two hosts
    are comparable.
    """
    groups = {name.partition("/")[0] for name in names}
    wanted = groups if groups and groups <= set(GROUPS) else GROUPS
    REGISTRY.built_in(tuple(each.replace("-", "_") for each in wanted))
    return _claims(GROUPS.values())


def brought_claims() -> tuple[list[Claim], list[PluginError]]:
    """Return the claims of installed packages, and the faults of unusable ones."""
    groups, faults = REGISTRY.plug_ins()
    return _claims(groups), faults


def select(names: Iterable[str], claims: list[Claim]) -> list[Claim]:
    """Return the claims of ``names``, each an id, a group, or an id without its group; all without names.

    Claims come in the order of ``claims``, then those of installed packages, which are searched for names not in
    ``claims``. Raises UsageError for an unknown name, with the nearest known ones, and PluginError if its package
    cannot be used.
    """
    names = list(names)
    if not names:
        return claims
    found = choose(names, _by_name(claims), _brought, lambda name: _unknown(name, claims))
    order = {claim.id: number for number, claim in enumerate(claims)}
    return sorted(found, key=lambda claim: order.get(claim.id, len(order)))


def _claims(groups: Iterable[Group]) -> list[Claim]:
    return [claim for each in groups for claim in each.claims.values()]


def _by_name(claims: Iterable[Claim]) -> dict[str, list[Claim]]:
    found: dict[str, list[Claim]] = {}
    for claim in claims:
        for name in claim.names:
            found.setdefault(name, []).append(claim)
    return found


def _brought(name: str) -> list[Claim]:
    own = REGISTRY.plug_in(name.partition("/")[0])
    claims = _claims([own]) if own is not None else brought_claims()[0]
    return _by_name(claims).get(name, [])


def _unknown(name: str, claims: list[Claim]) -> UsageError:
    brought, faults = brought_claims()
    offers = {key: key for key in GROUPS}
    for claim in [*claims, *brought]:
        offers |= dict(zip(claim.names, (claim.id, claim.id, claim.group), strict=True))
    otherwise = f"groups are {', '.join(GROUPS)}; pyvmm atlas --list names every claim"
    hint = nearest(name, offers, offers=offers, otherwise=otherwise)
    return UsageError(f"no claim is called {name!r}", hint="; ".join([hint, *(fault.message for fault in faults)]))
