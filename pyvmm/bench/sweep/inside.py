# SPDX-License-Identifier: Apache-2.0
"""``python3 -P -m pyvmm.bench.sweep.inside REQUEST``: measures one point and prints it as a results file.

The other side of ``work.request``: a sweep runs this wherever it measures a point, also in the lab. The status is 0
if the results are complete. Otherwise it is the error's status, and stderr says why.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from pyvmm import log
from pyvmm.bench.model import Point, Series, Value, footer, header, line
from pyvmm.errors import HostError, PyvmmError
from pyvmm.experiment.host.syscalls import prctl
from pyvmm.uapi.prctl import PR_SET_PDEATHSIG

Measure = Callable[[str, Point, float], list[Series]]


def main(argv: list[str]) -> int:
    """Measure the point in the only argument."""
    asked: dict[str, Any] = json.loads(argv[0])
    if asked["parent"] is not None and not ends_with(asked["parent"]):
        return 1
    log.configure(-1, json=False)
    from pyvmm._native_source import require_fresh_native
    from pyvmm.bench.task import measure_point
    from pyvmm.experiment.environment import conditions

    def measure(case: str, point: Point, deadline: float) -> list[Series]:
        _require_host()
        require_fresh_native()
        return measure_point(case, point, deadline=deadline)

    return tell(asked, conditions, measure)


def tell(asked: dict[str, Any], environment: Callable[[], Mapping[str, Value]], measure: Measure) -> int:
    """Measure, and print a whole results file, or the error."""
    begun = time.monotonic()
    try:
        series = measure(asked["case"], asked["point"], asked["deadline"])
        sys.stdout.write(header(environment(), {"case": asked["case"], "point": asked["point"]}))
        sys.stdout.writelines(line(each) for each in series)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        sys.stdout.write(footer({"seconds": round(time.monotonic() - begun, 3), "date": date}))
    except PyvmmError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


def _require_host() -> None:
    """Raise HostError if this host can measure no point, instead of giving every point as unavailable."""
    if os.uname().machine != "aarch64":
        raise HostError(f"this host is {os.uname().machine}; the benchmark's guests are arm64")
    from pyvmm.kvm.system import System

    System.open().close()


def ends_with(parent: int) -> bool:
    """Have the kernel kill this process when its parent ends; return False if the parent has already ended."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
