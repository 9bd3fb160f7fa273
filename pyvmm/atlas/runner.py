# SPDX-License-Identifier: Apache-2.0
"""Runs experiments, each in a process of its own with a deadline, so that none can hurt its neighbours.

A process that dies, or is past its deadline and killed with all it started, has that for its verdict.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from pyvmm.atlas.claim import Claim, Place
from pyvmm.atlas.model import Result
from pyvmm.errors import PyvmmError
from pyvmm.experiment import Experiment, Untold
from pyvmm.experiment.child import CrashedError, run_apart
from pyvmm.experiment.host.settings import Snapshot
from pyvmm.experiment.record import Event, Verdict

_DESCRIPTOR = re.compile(r"\b(?:kvm|vm|vcpu\d+|fd)=\d+(?:, |(?=\)))")


class Task(NamedTuple):
    """One claim in one place."""

    claim: Claim
    place: Place


def tasks(claims: Iterable[Claim], protections: Iterable[str] = (), backings: Iterable[str] = ()) -> list[Task]:
    """Return what there is to run, in order; the filters name protections and backings to keep, none keeps all."""
    protections, backings = set(protections), set(backings)
    return [
        Task(claim, place)
        for claim in claims
        for place in claim.places
        if (not protections or place.protection.value in protections) and (not backings or place.backing in backings)
    ]


def run(todo: Iterable[Task], *, deadline: float | None = None) -> Iterator[Result]:
    """Run one task after the other and yield the results as they come; ``deadline`` replaces the claims' own."""
    before = Snapshot()
    for task in todo:
        orderly = False
        try:
            result = conduct_apart(task, task.claim.seconds if deadline is None else deadline)
            orderly = result.verdict is not Verdict.CRASHED
        finally:
            if not orderly:  # it crashed, or was killed because we are to end
                before.restore()
        yield result


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


def conduct_apart(task: Task, deadline: float) -> Result:
    """Run an experiment in a process of its own and return its result, or how that process ended."""
    begun = time.monotonic()
    try:
        return Result.from_json(run_apart(lambda: conduct(task).to_json(), deadline))
    except CrashedError as crash:
        times = {"seconds": round(time.monotonic() - begun, 3)}
        return replace(_result(task, Verdict.CRASHED, crash.message), times=times)


def _result(task: Task, verdict: Verdict, reason: str) -> Result:
    claim, place = task
    return Result(
        claim.id, claim.group, claim.says, claim.origin, place.protection.value, place.backing, verdict, reason
    )
