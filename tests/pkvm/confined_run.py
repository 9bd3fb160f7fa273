# SPDX-License-Identifier: Apache-2.0
"""A run whose vCPU tries forbidden acts at its first cold exit, as code would that a guest executes in the process.

``confined_run.py USER DIRECTORY WORDS ...``: the words are those of a command line. It writes what came of the acts to
``report.json`` in the directory.
"""

from __future__ import annotations

import json
import os
import sys

from pyvmm.cli import main
from pyvmm.session.run import GuestRun
from pyvmm.vcpu.cold import ColdExits
from tests.unit.confined import Acts, tried


def hook(directory: str) -> None:
    """Have the next run try them. What they need is opened when inherited descriptors are known, before the walls."""
    to_end, handle = GuestRun.to_end, ColdExits.handle

    def opened(run: GuestRun) -> int:
        acts = Acts(directory)
        with open(f"{directory}/report.json", "w") as report, open("/proc/self/status") as status:
            found: dict[str, object] = {}

            def handled(cold: ColdExits, stop: int) -> bool:
                if not found:
                    found["forbidden"] = tried(acts.forbidden() | acts.others())
                    found["allowed"] = tried(acts.allowed())
                    found["status"] = status.read()
                    json.dump(found, report)
                    report.flush()
                return handle(cold, stop)

            setattr(ColdExits, "handle", handled)  # noqa: B010 - mypy lets nobody assign to a method
            return to_end(run)

    setattr(GuestRun, "to_end", opened)  # noqa: B010 - as above


if __name__ == "__main__":
    user, place, *words = sys.argv[1:]
    if user == "nobody":
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    hook(place)
    sys.exit(main(words))
