# SPDX-License-Identifier: Apache-2.0
"""``pyvmm`` on a fake pKVM host (:mod:`tests.fake_pkvm`), on any machine.

    python tests/unit/fake_pkvm_host.py SERIES NATIVE GUEST VERB ...

SERIES is the Linux that answers, NATIVE the file of :func:`tests.fake_kvm.built`, GUEST a name of
:data:`tests.fake_guests.GUESTS`, which every machine runs whatever its kernel is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(series: str, native: str, guest: str, *words: str) -> int:
    """Run a command line."""
    # What is imported below looks at the machine, and has the loop by its name.
    os.uname = lambda: os.uname_result(("Linux", "here", f"{series}.0", "", "aarch64"))
    from tests.fake_kvm import load_native

    module = sys.modules["pyvmm._native"] = load_native(Path(native))
    import pyvmm.kvm.fd
    from pyvmm import cli
    from pyvmm.kvm.vm import Vm
    from tests.fake_guests import GUESTS
    from tests.fake_pkvm import FakePkvm

    host = FakePkvm(series, GUESTS[guest])
    pyvmm.kvm.fd.Kernel.open = lambda self, path: host.open(path)  # type: ignore[method-assign]  # noqa: ARG005
    pyvmm.kvm.fd.Kernel.ioctl = lambda self, *call: host.ioctl(*call)  # type: ignore[method-assign]  # noqa: ARG005
    run_by = module.ffi.callback("int(int)", host.run)
    module.lib.fake_run_by(run_by)
    close = Vm.close

    def closed(vm: Vm) -> None:
        number = vm.fileno()
        close(vm)
        host.closed(number)

    Vm.close = closed  # type: ignore[assignment,method-assign]
    return cli.main(list(words))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
