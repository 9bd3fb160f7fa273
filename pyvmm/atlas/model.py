# SPDX-License-Identifier: Apache-2.0
"""The data of an atlas: results of claims, with their evidence, on one host; and its JSON form.

Data only. The runner makes it, the reports read it. Fields called ``times`` hold all values that change between runs on
the same machine. Two runs differ only there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyvmm.errors import UsageError
from pyvmm.experiment.record import Event, Evidence, Picture, Value, Verdict, renamed
from pyvmm.syntax.foreign import load_json

FORMAT = 2
"""Version of the JSON form. Format 1, whose host had ``emulated`` for ``tcg``, is still read; others are refused."""


@dataclass(frozen=True, slots=True)
class Result:
    """A claim's verdict in one protection over one backing. ``says``, ``group`` and ``origin`` are the claim's own."""

    id: str
    group: str
    says: str
    origin: str
    protection: str
    backing: str
    verdict: Verdict
    reason: str = ""
    """Why the claim cannot be tested, how the experiment crashed, or why it stopped."""
    evidence: tuple[Evidence, ...] = ()
    pictures: tuple[Picture, ...] = ()
    events: tuple[Event, ...] = ()
    times: dict[str, Any] = field(default_factory=dict)
    """``seconds`` of the experiment, ``ticks`` by what was timed, ``events`` in ns since the experiment's start."""

    @property
    def key(self) -> tuple[str, str, str]:
        """Its unique key in an atlas: (id, protection, backing)."""
        return self.id, self.protection, self.backing

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "id": self.id,
            "group": self.group,
            "says": self.says,
            "origin": self.origin,
            "protection": self.protection,
            "backing": self.backing,
            "verdict": self.verdict.value,
            "reason": self.reason,
            "evidence": [
                {"what": e.what, "saw": e.saw} | ({} if e.wanted is None else {"wanted": e.wanted})
                for e in self.evidence
            ],
            "pictures": [{"title": p.title, "runs": [list(run) for run in p.runs]} for p in self.pictures],
            # Their order depends on time: of two vCPUs that fault together, either may be first.
            "times": self.times | {"happened": [[e.order, e.kind, e.gpa, e.pages] for e in self.events]},
        }

    def _repr_html_(self) -> str:
        """Show the verdict, its evidence and its pictures in a notebook, which calls this."""
        from pyvmm.atlas.report.notebook import fragment

        return fragment(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """Undo :meth:`to_json`. Raises LookupError, TypeError or ValueError for other data."""
        times = dict(data["times"])
        happened = times.pop("happened")
        return cls(
            **{name: str(data[name]) for name in ("id", "group", "says", "origin", "protection", "backing", "reason")},
            verdict=Verdict(data["verdict"]),
            evidence=tuple(Evidence(e["what"], e["saw"], e.get("wanted")) for e in data["evidence"]),
            pictures=tuple(
                Picture(p["title"], [(int(gpa), int(pages), int(entry)) for gpa, pages, entry in p["runs"]])
                for p in data["pictures"]
            ),
            events=tuple(Event(int(o), str(kind), int(gpa), int(pages)) for o, kind, gpa, pages in happened),
            times=times,
        )


@dataclass(frozen=True, slots=True)
class Atlas:
    """All results of one run, and the host.

    ``host`` holds plain values. Reports know the following fields, and show others unchanged: ``kernel`` (release),
    ``version`` (of that build), ``mode`` (KVM's: protected, vhe, nvhe), ``machine``, ``cpu``, ``tcg`` (a bool: under
    QEMU's TCG, times are only relative) and ``pyvmm`` (version). ``times`` holds ``date`` (ISO 8601) and ``seconds``.
    """

    host: dict[str, Value]
    results: tuple[Result, ...]
    times: dict[str, Any] = field(default_factory=dict)

    def groups(self) -> dict[str, list[Result]]:
        """Return the results by group, both in the order of the run."""
        found: dict[str, list[Result]] = {}
        for result in self.results:
            found.setdefault(result.group, []).append(result)
        return found

    def columns(self) -> list[tuple[str, str]]:
        """Return the (protection, backing) pairs that occur, in the order of the run."""
        return list(dict.fromkeys((result.protection, result.backing) for result in self.results))

    def counts(self) -> dict[Verdict, int]:
        """Count the results by verdict."""
        return {verdict: sum(result.verdict is verdict for result in self.results) for verdict in Verdict}

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ``claims`` being the results."""
        claims = [result.to_json() for result in self.results]
        return {"atlas": FORMAT, "host": self.host, "claims": claims, "times": self.times}

    @classmethod
    def from_json(cls, data: Any, name: str = "this") -> Atlas:
        """Undo :meth:`to_json`. Raises UsageError, with ``name``, for data that is not an atlas of this format."""
        if not isinstance(data, dict) or "claims" not in data:
            raise UsageError(f"{name} is not an atlas", hint="pyvmm atlas --json FILE writes one")
        theirs = data.get("atlas")
        if theirs not in (1, FORMAT):
            raise UsageError(f"{name} is an atlas of format {theirs!r}; this pyvmm reads formats 1 and {FORMAT}")
        try:
            results = tuple(Result.from_json(claim) for claim in data["claims"])
            host = renamed(data["host"]) if theirs == 1 else dict(data["host"])
            return cls(host, results, dict(data.get("times", {})))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{name} is not a whole atlas: {type(error).__name__}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Atlas:
        """Read the file of ``--json``. Raises UsageError if it is missing or is not an atlas."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from None
        try:
            data = load_json(text)
        except ValueError as error:
            raise UsageError(f"{path} is not JSON: {error}", hint="pyvmm atlas --json FILE writes one") from None
        return cls.from_json(data, str(path))
