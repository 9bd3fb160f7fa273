# SPDX-License-Identifier: Apache-2.0
"""Run a guest from a script, record evidence about it, and access its memory from the host's side.

    from pyvmm.experiment import Experiment
    from pyvmm.protection import Protection

    with Experiment(Protection.PKVM) as x:
        page = x.page()
        x.guest.write64(page, 42)
        x.check("the host is locked out", x.host64(page) is None)
        x.guest.share(page)
        x.check("the host reads what the guest wrote", x.host64(page), 42)
    print(x.verdict.value, *x.evidence, sep="\\n")

Claims, benchmark cases, scripts and the prompt of ``pyvmm repl`` are written with these names.
"""

from pyvmm.experiment.experiment import BEYOND, PATIENCE, Experiment, Untold
from pyvmm.experiment.record import Verdict

__all__ = ["BEYOND", "PATIENCE", "Experiment", "Untold", "Verdict"]
