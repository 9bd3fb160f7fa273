# SPDX-License-Identifier: Apache-2.0
"""The atlas: what the kernel really does with guest memory, claim by claim, each one an experiment on this host.

from pyvmm.atlas import Experiment
from pyvmm.protection import Protection

with Experiment(Protection.PKVM) as x:
    page = x.page()
    x.guest.write64(page, 42)
    x.check("the host is locked out", x.host64(page) is None)
    x.guest.share(page)
    x.check("the host reads what the guest wrote", x.host64(page), 42)
print(x.verdict.value, *x.evidence, sep="\\n")
"""

from pyvmm.atlas.model import Atlas, Verdict
from pyvmm.experiment.experiment import Experiment, Untold

__all__ = ["Atlas", "Experiment", "Untold", "Verdict"]
