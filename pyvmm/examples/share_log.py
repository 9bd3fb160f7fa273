# SPDX-License-Identifier: Apache-2.0
"""Print every share and unshare of a protected guest before the guest goes on.

On a pKVM host::

    python -m pyvmm.examples.share_log

Elsewhere, in the lab::

    pyvmm lab exec -- python3 -m pyvmm.examples.share_log

A subscriber of the share relay runs in the thread of the vCPU that shares. The guest waits until it returns. To show
that, this subscriber stores the event's number in each shared page. The guest's next load finds it.
"""

from __future__ import annotations

from itertools import count

from pyvmm.experiment import Experiment
from pyvmm.memory.relay import ShareEvent
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection

PAGES = 3


def main() -> None:
    """Have a guest share three pages and take one back."""
    numbers = count(1)
    with Experiment(Protection.PKVM) as x:

        def hear(event: ShareEvent) -> None:
            number, end = next(numbers), event.gpa + event.npages * HOST_PAGE
            what = "shares" if event.shared else "unshares"
            print(f"{number}: the guest {what} {event.gpa:#x} to {end:#x} ({event.source.name.lower()})")
            if event.shared:
                x.memory.write(event.gpa, number.to_bytes(8, "little"))

        end_subscription = x.machine.relay.subscribe(hear)
        first = x.page(PAGES)
        x.guest.share(first, PAGES)
        print("the guest finds", *(x.guest.read64(first + index * HOST_PAGE) for index in range(PAGES)))
        x.guest.unshare(first)
        print("the host reads", x.host64(first), "from the first page,", x.host64(first + HOST_PAGE), "from the second")
        end_subscription()
        x.guest.unshare(first + HOST_PAGE)  # nobody hears of it


if __name__ == "__main__":
    main()
