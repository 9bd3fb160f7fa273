# SPDX-License-Identifier: Apache-2.0
"""The tasks of an atlas run: a claim in one place, tested in a child process, and its result.

If the child process dies, or is killed at its deadline with its descendants, the verdict is crashed.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from pyvmm.atlas.claim import Claim, Place
from pyvmm.atlas.model import Result
from pyvmm.errors import PyvmmError
from pyvmm.experiment import Experiment, Untold
from pyvmm.experiment.record import Event, Verdict

_DESCRIPTOR = re.compile(r"\b(?:kvm|vm|vcpu\d+|fd)=\d+(?:, |(?=\)))")


class Task(NamedTuple):
    """One claim in one place; see :class:`pyvmm.experiment.runner.Task`."""

    claim: Claim
    place: Place

    @property
    def seconds(self) -> float:
        """The claim's own deadline."""
        return self.claim.seconds

    def conduct(self, _seconds: float) -> dict[str, Any]:
        """Run the experiment in this process and return its result, even if the experiment raises."""
        return conduct(self).to_json()

    def result(self, data: dict[str, Any]) -> Result:
        """Convert the JSON values of :meth:`conduct` to a result."""
        return Result.from_json(data)

    def crashed(self, why: str, seconds: float) -> Result:
        """Return the result of an experiment that killed its process, or was killed."""
        return replace(_result(self, Verdict.CRASHED, why), times={"seconds": seconds})

    def is_orderly(self, result: Result) -> bool:
        """Whether the experiment came to its end."""
        return result.verdict is not Verdict.CRASHED


def tasks(claims: Iterable[Claim], protections: Iterable[str] = (), backings: Iterable[str] = ()) -> list[Task]:
    """Return the tasks in order. The filters name protections and backings to keep; an empty filter keeps all."""
    protections, backings = set(protections), set(backings)
    return [
        Task(claim, place)
        for claim in claims
        for place in claim.places
        if (not protections or place.protection.value in protections) and (not backings or place.backing in backings)
    ]


def conduct(task: Task) -> Result:
    """Run an experiment in this very process and return its result, whatever the experiment does."""
    claim, place = task
    x = Experiment(place.protection, place.backing, **claim.options)
    begun = time.monotonic()
    verdict, reason = Verdict.UNTOLD, ""
    events: tuple[Event, ...] = ()
    ns: list[int] = []
    try:
        with x:
            claim.function(x)
            events, ns = x.events()
        verdict = x.verdict
    except (PyvmmError, OSError) as error:
        message = error.message if isinstance(error, PyvmmError) else str(error)
        # Numbers of descriptors tell nothing, and are others when anything else is.
        reason = _DESCRIPTOR.sub("", message if isinstance(error, Untold) else f"the experiment stopped: {message}")
        reason += "".join(f"; KVM_RUN of vCPU {failure.vcpu} failed: {failure}" for failure in x.unasked_failures())
        if any(entry.ok is False for entry in x.evidence):
            verdict = Verdict.FAILS  # what was seen before contradicts the claim, whatever came after
    except Exception as error:
        verdict = Verdict.CRASHED
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"the experiment raised {type(error).__name__}: {error} (line {where.lineno} of {where.name})"
    times = {"seconds": round(time.monotonic() - begun, 3), "ticks": x.ticks, "events": ns}
    return replace(
        _result(task, verdict, reason),
        evidence=tuple(x.evidence),
        pictures=tuple(x.pictures),
        events=events,
        times=times,
    )


def _result(task: Task, verdict: Verdict, reason: str) -> Result:
    claim, place = task
    return Result(
        claim.id, claim.group, claim.says, claim.origin, place.protection.value, place.backing, verdict, reason
    )
