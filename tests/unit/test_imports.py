# SPDX-License-Identifier: Apache-2.0
"""Starting is cheap: parsing a command line loads no third-party module except structlog and cffi's backend.

tests/bench/startup.py measures the milliseconds: a test of time would fail on a busy machine.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.payloads import payload

ALLOWED = {"structlog", "_cffi_backend"}


def loaded(code: str) -> tuple[set[str], set[str]]:
    """Return the top-level modules that a fresh interpreter has loaded after ``code``, except its own and pyvmm's."""
    report = f"import sys\n{code}\nimport json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, timeout=60, check=True)
    bare = subprocess.run([sys.executable, "-c", report.replace(code, "")], capture_output=True, text=True, check=True)
    new = set(json.loads(done.stdout.splitlines()[-1])) - set(json.loads(bare.stdout))
    names = {name.partition(".")[0] for name in new}
    return names, {name for name in names if name not in sys.stdlib_module_names} - {"pyvmm", "__mp_main__"}


def test_loaded_notices_a_module() -> None:
    assert loaded("import hypothesis")[1] >= {"hypothesis"}


def test_importing_pyvmm_loads_no_third_party_module() -> None:
    assert loaded("import pyvmm")[1] == set()


COMMANDS = [
    ["run", "--protection", "pkvm", "-m", "1G", "-c", "2", "-p", "a=1", "payload:hello"],
    ["demo"],
    ["doctor", "--json"],
    ["lab", "status"],
    ["atlas", "share", "--json", "a.json"],
    ["bench", "fault", "--quick", "--json", "a.jsonl"],
    ["bench", "sweep", "a.toml", "--labs", "2"],
    ["map", "payload:echo"],
    ["top", "--json", "123"],
    ["trace", "-o", "echo.pftrace", "payload:echo"],
    ["repl", "--protection", "pkvm"],
    ["help", "lab"],
    ["completion", "bash"],
    ["--lab", "run", "payload:hello"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words[:2]) for words in COMMANDS])
def test_parsing_a_command_line_loads_no_third_party_module(words: list[str]) -> None:
    names, others = loaded(f"from pyvmm.cli import make_parser; make_parser({words}).parse_args({words})")
    assert others <= ALLOWED
    assert "argparse" in names
    assert not names & {"asyncio", "logging", "subprocess", "ctypes"}


def test_parsing_a_run_loads_no_typing() -> None:
    # typing costs a fifth of what a command line takes beyond bare Python.
    words = COMMANDS[0]
    assert "typing" not in loaded(f"from pyvmm.cli import make_parser; make_parser({words}).parse_args({words})")[0]


@pytest.mark.parametrize("verb", ["run", "doctor", "demo", "lab", "atlas", "map", "repl"])
def test_help_loads_only_the_requested_verb(verb: str) -> None:
    wanted = [verb]
    code = f"""
import sys
from pyvmm.cli import VERBS, make_parser
make_parser(['{verb}'])
assert [v for v in VERBS if f'pyvmm.cli.{{v}}' in sys.modules] == {wanted}
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_building_a_machine_from_a_flat_binary_loads_only_allowed_modules() -> None:
    code = "from pyvmm.machine.machine import Machine\nfrom pyvmm.machine import boot\nboot.read('payload:hello')"
    assert loaded(code)[1] <= ALLOWED


STDLIB = """
__future__ argparse bisect collections.abc contextlib ctypes enum errno fcntl gc importlib locale mmap operator os re
select signal struct sys threading
"""
"""What of the standard library the way to a guest imports; what these import themselves comes with them. locale is
argparse's, for its messages."""

OURS = """
pyvmm _native _native.lib _native_source abi errors interrupt labenv log outlet pages payloads protection typed

cli cli.common cli.run
devices devices.base devices.bus devices.echo devices.exit_targets devices.kind devices.mailbox devices.pl011
devices.pl031 devices.rates devices.roles devices.share_bell
devices.kinds devices.kinds.balloon devices.kinds.console devices.kinds.disk devices.kinds.net devices.kinds.rng
devices.kinds.vmgenid devices.kinds.vsock
guest guest.kernels
kvm kvm.device kvm.fd kvm.libc kvm.stats kvm.system kvm.vcpu kvm.vm
machine machine.boot machine.config machine.content machine.describing machine.ending machine.fdt machine.gic
machine.granule machine.hardware machine.irq machine.layout machine.machine machine.ram machine.start machine.threads
machine.vm
memory memory.address memory.backing memory.choices memory.ledger memory.memory memory.mman memory.relay memory.slots
options options.consoles options.contradictions options.devices options.guest options.machine options.table
session session.consoles session.control session.requests session.run session.signals
syntax syntax.option syntax.parts syntax.paths syntax.values
uapi uapi.falloc uapi.ioctl uapi.kvm uapi.kvm_arm64 uapi.kvm_cap uapi.layout uapi.memfd uapi.mman
vcpu vcpu.cold vcpu.outcome vcpu.thread
"""
"""Every module of pyvmm that is loaded at the first KVM_RUN of ``pyvmm run payload:hello``."""

DISK_AND_CARD = """
devices.virtio devices.virtio.blk devices.virtio.device devices.virtio.disk devices.virtio.limit devices.virtio.mmio
devices.virtio.net devices.virtio.netbackend devices.virtio.queue devices.virtio.registers devices.virtio.registerstate
devices.virtio.worker machine.devices machine.kicks uapi.fs uapi.kvm_irq
"""
"""And of a guest with a disk, and a card before a socket, besides; which imports socket."""

TO_THE_GUEST = """
import os, sys, threading

before = set(sys.modules) - {"threading"}
compiled = []

def hear(event, values):
    # Those without a file; functools, which some Python's start has not loaded yet, makes one namedtuple.
    if event == "compile" and values[1].startswith("<") and b"hits, misses, maxsize, currsize" not in values[0]:
        compiled.append(values[0])

sys.addaudithook(hear)

def file(size=0x2000):
    number = os.memfd_create("kvm")
    os.ftruncate(number, size)
    return number

def ioctl(kernel, fd, request, argument, values):
    if request.name == "KVM_CREATE_DEVICE":
        argument.fd = file()
    if request.name in ("KVM_CREATE_VM", "KVM_CREATE_VCPU"):
        return file(), 0
    answers = {"KVM_GET_API_VERSION": 12, "KVM_CHECK_EXTENSION": 40, "KVM_GET_VCPU_MMAP_SIZE": 0x2000}
    return answers.get(request.name, 0), 0

def start(thread):
    if thread.name == "pyvmm-vcpu0":  # whose next step is KVM_RUN
        print(*sorted(set(sys.modules) - before))
        print(*compiled, flush=True)
        os._exit(0)
    started(thread)

started, threading.Thread.start = threading.Thread.start, start
os.uname = lambda: os.uname_result(("Linux", "here", "7.3", "", "aarch64"))
import pyvmm._native_source, pyvmm.kvm.fd, pyvmm.session.control
pyvmm._native_source.NATIVE = "/nowhere"  # as where it is installed
pyvmm.session.control.SETTLED = 3600.0  # however slow this machine is
pyvmm.kvm.fd.Kernel.open = lambda kernel, path: file()
pyvmm.kvm.fd.Kernel.ioctl = ioctl
from pyvmm.cli import main
sys.exit(main())
"""
"""A run on a KVM that says yes to everything, until its first vCPU starts."""


def at_first_kvm_run(script: Path, *words: str) -> tuple[set[str], str]:
    """Return the modules that a run of these words has loaded beyond bare Python, and the sources it has compiled."""
    script.write_text(TO_THE_GUEST)
    command = [sys.executable, "-S", str(script), "run", *words]
    path = os.pathsep.join(path for path in sys.path if path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
    environment |= {"PYTHONPATH": path, "LANG": "en_US.UTF-8"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    modules, compiled = done.stdout.splitlines()
    return set(modules.split()), compiled


def with_their_own(names: str) -> set[str]:
    """Return these modules of the standard library and what they import."""
    code = (
        f"import sys; before = set(sys.modules)\nimport {', '.join(names.split())}\nprint(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    return {*done.stdout.split(), *names.split()}


def is_ours(module: str) -> bool:
    return module.partition(".")[0] == "pyvmm"


def others(modules: set[str]) -> set[str]:
    return {module for module in modules if not is_ours(module)} - {"_cffi_backend"}


def ours(modules: str) -> set[str]:
    return {module if module == "pyvmm" else f"pyvmm.{module}" for module in modules.split()}


def test_a_run_has_loaded_only_the_modules_it_needs_at_its_first_kvm_run(tmp_path: Path) -> None:
    modules, _ = at_first_kvm_run(tmp_path / "run.py", "payload:hello")
    assert {module for module in modules if is_ours(module)} == ours(OURS)
    assert others(modules) <= with_their_own(STDLIB)


def test_a_run_with_a_disk_and_a_network_card_has_loaded_only_these_as_well(tmp_path: Path) -> None:
    disk, kernel = tmp_path / "disk", tmp_path / "kernel"
    disk.write_bytes(bytes(4096))
    kernel.write_bytes(payload("hello"))
    with socket.socket(socket.AF_UNIX) as passt:
        passt.bind(str(tmp_path / "passt"))
        passt.listen()
        words = [
            "-p",
            "quiet",
            "--disk",
            str(disk),
            "--net",
            f"socket={tmp_path}/passt,mac=02:00:00:00:00:01",
            str(kernel),
        ]
        modules, _ = at_first_kvm_run(tmp_path / "run.py", *words)
    assert {module for module in modules if is_ours(module)} == ours(OURS + DISK_AND_CARD) - ours("payloads")
    assert others(modules) <= with_their_own(STDLIB + "socket")


def test_a_run_compiles_nothing_until_its_first_kvm_run(tmp_path: Path) -> None:
    # Compiling a first string costs as much as a dozen imports. String annotations of a NamedTuple are compiled.
    assert at_first_kvm_run(tmp_path / "run.py", "payload:hello")[1] == ""
