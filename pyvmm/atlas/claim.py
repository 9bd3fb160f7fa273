# SPDX-License-Identifier: Apache-2.0
"""What a claim is, and the list of all of them.

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

Owns nothing but the registry, which is filled when the modules in ``pyvmm.atlas.claims`` are imported.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pyvmm.errors import UsageError
from pyvmm.protection import Protection

if TYPE_CHECKING:
    from pyvmm.experiment import Experiment

DEADLINE = 60.0
"""Seconds an experiment may take before its process is killed, unless the claim says otherwise."""

Function = Callable[["Experiment"], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a claim is tried: a protection, and the backing of the guest's memory."""

    protection: Protection
    backing: str

    def __str__(self) -> str:
        return f"{self.protection.value}/{self.backing}"


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement about the kernel and the experiment that tells."""

    id: str
    group: str
    says: str
    origin: str
    places: tuple[Place, ...]
    function: Function
    seconds: float = DEADLINE
    options: dict[str, Any] = field(default_factory=dict)
    """What its experiment is made with, besides the place: see Experiment."""


REGISTRY: dict[str, Claim] = {}
"""Every claim by its id, in the order of the modules and of the functions in them."""

GROUPS = {
    "fault-in": "How pages get into the guest",
    "ownership": "Who can still touch a page",
    "share": "What a share and an unshare do",
    "conversion": "What conversions do to contents",
    "private-fd": "What guest_memfd and holes in it mean",
    "lazy": "Memory that is provided late",
    "huge": "Huge pages",
    "fatal": "What is refused, and what is final",
    "teardown": "What the end leaves behind",
}
"""The groups in the order they are reported in, each with its heading."""


class Decorator(Protocol):
    """What :func:`group` returns."""

    def __call__(
        self,
        *,
        origin: str,
        none: str = "",
        emulated: str = "",
        pkvm: str = "",
        seconds: float = DEADLINE,
        **options: Any,
    ) -> Callable[[Function], Function]:
        """Register a function as a claim of the group; the protections name the backings it is tried over."""
        ...


def group(name: str) -> Decorator:
    """Return the decorator that registers the claims of one group (a key of GROUPS)."""
    if name not in GROUPS:
        raise ValueError(f"no group is called {name!r}")

    def decorator(
        *, origin: str, none: str = "", emulated: str = "", pkvm: str = "", seconds: float = DEADLINE, **options: Any
    ) -> Callable[[Function], Function]:
        wanted = {Protection.NONE: none, Protection.EMULATED: emulated, Protection.PKVM: pkvm}
        places = tuple(Place(protection, backing) for protection, text in wanted.items() for backing in text.split())

        def register(function: Function) -> Function:
            id = f"{name}/{function.__name__.replace('_', '-')}"
            if id in REGISTRY:
                raise ValueError(f"two claims are called {id}")
            if not places:
                raise ValueError(f"{id} is tried nowhere")
            says = " ".join(inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].split())
            REGISTRY[id] = Claim(id, name, says, origin, places, function, seconds, options)
            return function

        return register

    return decorator


def all_claims(names: Iterable[str] = ()) -> list[Claim]:
    """Import the modules of claims and return their claims, group by group.

    Where every one of ``names`` tells its group, only these groups' modules are imported: a module's name starts with
    its group's.
    """
    from pyvmm.atlas import claims

    groups = {name.partition("/")[0] for name in names}
    prefixes = tuple(group.replace("-", "_") for group in (groups if groups and groups <= set(GROUPS) else GROUPS))
    for info in pkgutil.iter_modules(claims.__path__):
        if info.name.startswith(prefixes):
            importlib.import_module(f"pyvmm.atlas.claims.{info.name}")
    order = list(GROUPS)
    return sorted(REGISTRY.values(), key=lambda each: order.index(each.group))


def select(names: Iterable[str], claims: list[Claim]) -> list[Claim]:
    """Return the claims that ``names`` ask for, each an id, a group, or an id without its group; all for no name.

    Raises UsageError for an unknown name, with the nearest known ones.
    """
    wanted: set[str] = set()
    names = list(names)
    for name in names:
        found = {claim.id for claim in claims if name in (claim.id, claim.group, claim.id.partition("/")[2])}
        if not found:
            raise UsageError(f"no claim is called {name!r}", hint=_nearest(name, claims))
        wanted |= found
    return [claim for claim in claims if not names or claim.id in wanted]


def _nearest(name: str, claims: list[Claim]) -> str:
    known = {claim.id.partition("/")[2]: claim.id for claim in claims} | {key: key for key in GROUPS}
    known |= {claim.id: claim.id for claim in claims}
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    near += [key for key in known if name and name in key][:3]
    if near:
        return f"the nearest: {', '.join(dict.fromkeys(known[key] for key in near))}"
    return f"groups are {', '.join(GROUPS)}; pyvmm atlas --list names every claim"
