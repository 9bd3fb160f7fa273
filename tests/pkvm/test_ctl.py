# SPDX-License-Identifier: Apache-2.0
"""Orders to a real run through its socket."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyvmm.session.connection import Connection

pytestmark = pytest.mark.pkvm
PAUSED = {"state": "paused", "clock": "goes on: the hypervisor keeps a protected guest's counters"}
PYVMM = (sys.executable, "-m", "pyvmm")


def test_a_protected_run_answers_pauses_resumes_and_stops_on_order(tmp_path: Path) -> None:
    path = str(tmp_path / "vm.sock")
    command = [*PYVMM, "run", "--pkvm", "-c", "2", "--rng", "--socket", path, "-k", "payload:crash", "-p", "loop"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    assert run.stdout is not None
    assert "way=loop" in run.stdout.readline()
    with Connection(path) as connection:
        info = connection.ask("info", patience=30)
        assert info is not None
        assert (info["state"], info["protection"], info["cpus"], info["pid"]) == ("running", "pkvm", 2, run.pid)
        assert connection.ask("pause", patience=30) == PAUSED
        before = connection.ask("counters", patience=30)
        time.sleep(0.3)
        after = connection.ask("counters", patience=30)
        assert before is not None
        assert after is not None
        assert [vcpu["exits"] for vcpu in before["vcpus"]] == [vcpu["exits"] for vcpu in after["vcpus"]]
        assert connection.ask("resume", patience=30) == {"state": "running"}
        # A paused run can be stopped, with all its devices.
        assert connection.ask("pause", patience=30) == PAUSED
    done = subprocess.run([*PYVMM, "ctl", path, "stop"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "state: ended\n"), done
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "pyvmm ctl stop" in stderr
