# SPDX-License-Identifier: Apache-2.0
"""Punch a hole under a running guest, and compare what guest and host find there.

On a pKVM host::

    python -m pyvmm.examples.hole

Elsewhere, in the lab::

    pyvmm lab exec -- python3 -m pyvmm.examples.hole

The guest stores 42. The host drops that page from the file behind the guest's memory. A plain guest then finds zeros. A
protected guest keeps its page, because the hypervisor has pinned it. The host gets another page at the same address.
"""

from __future__ import annotations

from pyvmm.experiment import Experiment, Untold
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection

PLACES = ((Protection.NONE, "memfd"), (Protection.NONE, "private"), (Protection.PKVM, "memfd"))
"""Each guest's protection, and what its memory is made of. The host can never map a ``private`` file."""


def punch(protection: Protection, backing: str) -> tuple[int, int | None]:
    """Return what the guest and the host read after the punch; None where the host's load faults.

    Raises Untold where this host cannot make such a guest.
    """
    with Experiment(protection, backing) as x:
        page = x.page()
        x.guest.write64(page, 42)
        # Under pKVM this splits the page in two, so pyvmm wants it confirmed.
        x.memory.punch(page, HOST_PAGE, unsafe=protection.by_hypervisor)
        return x.guest.read64(page), x.host64(page)


def main() -> None:
    """Print a line for each place."""
    for protection, backing in PLACES:
        place = f"{protection.value:5} {backing:8}"
        try:
            guest, host = punch(protection, backing)
        except Untold as why:
            print(f"{place} {why}")
        else:
            print(f"{place} the guest reads {guest:2}, the host {'faults' if host is None else f'reads {host}'}")


if __name__ == "__main__":
    main()
