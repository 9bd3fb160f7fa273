# SPDX-License-Identifier: Apache-2.0
"""``pyvmm run``: one guest from start to end. Guest output on stdout; ours, the closing statistics last, on stderr.

The default protection is ``none``: it works on every arm64 host, and a guest is called protected only when protection
was asked for by name.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
from typing import TYPE_CHECKING

from pyvmm import log
from pyvmm.cli.common import Help, add_common, require_arm64
from pyvmm.errors import PyvmmError, UsageError, hex_
from pyvmm.memory.choices import BACKINGS, CONVERSIONS, DEFAULT_MEMORY, ConversionPolicy
from pyvmm.options.devices import add_device_options, device_specs
from pyvmm.protection import PROTECTIONS, Protection
from pyvmm.session.consoles import Ends, following_size, nobody, open_place, places
from pyvmm.syntax.paths import OutputPath, open_output, output_behind
from pyvmm.syntax.values import parse_count, parse_memory, parse_seconds

if TYPE_CHECKING:
    from pyvmm.cli.trace import Tracing
    from pyvmm.machine.config import MachineConfig
    from pyvmm.session.watch import Watch

STDOUT = 1

CRASH = "payload:crash"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Define the verb's options."""
    parser = subparsers.add_parser(
        "run",
        help="run a guest",
        allow_abbrev=False,
        formatter_class=Help,
        description="Run a guest until it powers off. Its console is stdin and stdout; on a terminal Ctrl-A x quits.",
        epilog="examples:\n"
        "  pyvmm run payload:hello\n"
        "  pyvmm run --protection pkvm -m 256M -c 2 payload:echo\n"
        "  pyvmm run --deadline 10 payload:crash -p loop\n"
        "  pyvmm run --protection pkvm -i shell: debian:\n"
        "  pyvmm run -i shell: -p 'quiet -- cat /proc/cpuinfo' own:\n"
        "  pyvmm --lab run --protection pkvm payload:hello",
    )
    add_guest_options(parser)
    parser.add_argument(
        "--reboot", action="store_true", help="start the guest again, in a new VM, when it asks for a reset"
    )
    add_common(parser)


def add_guest_options(parser: argparse.ArgumentParser) -> None:
    """Define what says which guest to run, how, and what to keep of it: the options of every verb that runs one."""
    parser.add_argument(
        "kernel",
        metavar="KERNEL",
        nargs="?",
        help="arm64 Image (plain, gzip or EFI zboot of gzip), ELF, flat binary, payload:NAME, debian: or debian:stable "
        "(Debian's kernels that the lab has), or own: (of pyvmm lab kernel)",
    )
    parser.add_argument("-k", "--kernel", dest="kernel_option", metavar="KERNEL", help="the same, as an option")
    parser.add_argument(
        "-i",
        "--initrd",
        "--initramfs",
        metavar="FILE",
        help="initial root file system; or shell:, a shell on the console, or the command behind ' -- ' in the params",
    )
    parser.add_argument(
        "-p",
        "--params",
        "--cmdline",
        "--append",
        metavar="TEXT",
        action="append",
        default=[],
        help="kernel command line or payload parameters; may be repeated",
    )
    parser.add_argument(
        "--dtb",
        metavar="FILE",
        help="give the guest this device tree as it is, not one that describes the machine (--dump-dtb writes that); "
        "where the initrd is, it must say itself",
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "-m",
        "--mem",
        metavar="SIZE[@GPA]",
        type=parse_memory,
        default=(None, None),
        help="memory: 512M, 1G, or MiB without a unit (64M; 256M for debian: and own:); it starts at 0x80000000",
    )
    machine.add_argument("-c", "--cpus", metavar="N", type=parse_count, default=1, help="vCPUs (default 1)")
    machine.add_argument(
        "--backing",
        choices=BACKINGS,
        help="what guest memory is: anonymous memory (default, but for emulated), which most hosts back by huge pages,"
        " a memfd, one with huge pages, or a guest_memfd",
    )
    machine.add_argument(
        "--prefault",
        action="store_true",
        help="populate all memory before the start, in huge pages where the host gives them: first touches cost less",
    )
    machine.add_argument("--deadline", metavar="SECONDS", type=parse_seconds, help="end the run then, with status 4")
    machine.add_argument(
        "--socket", metavar="PATH", help="make a socket there for pyvmm ctl, besides the one that every run has"
    )
    machine.add_argument(
        "--gdb",
        metavar="WHERE",
        help="wait for gdb before the guest's first instruction: a unix socket's path, or tcp:[HOST:]PORT (HOST is "
        "127.0.0.1 unless said); WHERE,nowait does not wait",
    )
    machine.add_argument(
        "--serial",
        metavar="WHERE",
        type=output_behind("file"),
        help="the UART, the console of most guests: stdio (default, unless --console has it), file=PATH, or none",
    )

    add_device_options(parser)

    protection = parser.add_argument_group("protection")
    # One of them: who asks for protection must not get a plain VM because another flag came later.
    which = protection.add_mutually_exclusive_group()
    which.add_argument(
        "--protection",
        choices=PROTECTIONS,
        default="none",
        help="none (default); pkvm: by the hypervisor; emulated: the same calls, served and enforced by pyvmm",
    )
    for alias in ("--protected-vm", "--pkvm"):
        which.add_argument(
            alias, dest="protection", action="store_const", const="pkvm", help="the same as --protection pkvm"
        )
    protection.add_argument(
        "--conversion",
        choices=CONVERSIONS,
        default="preserve",
        help="what becomes of a page's contents when it changes hands (emulated only; default preserve)",
    )

    config = parser.add_argument_group("configuration")
    config.add_argument(
        "--config", metavar="FILE.toml", help="options from a file: long names as keys; what is said here goes first"
    )
    config.add_argument("--print-config", action="store_true", help="print such a file of these options, run nothing")
    config.add_argument(
        "--restore", metavar="FILE", help="go on from a snapshot (pyvmm ctl snapshot), which brings kernel and options"
    )
    config.add_argument(
        "--dry-run",
        action="store_true",
        help="print what the machine would be, and every ioctl that would make it; needs no KVM, on any workstation",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--dump-dtb",
        type=OutputPath,
        metavar="FILE",
        help="write the guest's device tree to FILE, without the seeds of its random numbers",
    )
    output.add_argument("--stats", action="store_true", help="end with a table of exits and what they cost")
    output.add_argument(
        "--map",
        type=OutputPath,
        metavar="FILE.svg",
        help="draw guest memory as it is at the end, and what happened to it: faults (root only), shares, conversions",
    )
    output.add_argument(
        "--trace",
        type=OutputPath,
        metavar="FILE",
        help="record every exit, share and conversion for https://ui.perfetto.dev; costs less than 3 %% of an exit",
    )
    output.add_argument(
        "--trace-faults", action="store_true", help="and the guest's faults (root only); costs some 5 %% of an exit"
    )
    output.add_argument(
        "--trace-el2",
        action="store_true",
        help="and when the hypervisor ran (root only, on a kernel that tells: --lab --host-kernel own); costs more",
    )


def main(args: argparse.Namespace) -> int:
    """Run the guest; returns the exit status."""
    kernel = ready(args)
    tracing = traced(args)
    if args.map is None and tracing is None:
        return run_guest(args, kernel, reboot=args.reboot)
    from pyvmm.session.watch import Watch

    return run_guest(args, kernel, Watch(args.map, trace=tracing))


def traced(args: argparse.Namespace) -> Tracing | None:
    """Return what is to be traced, if anything is."""
    if args.trace is None:
        return None
    from pyvmm.cli.trace import Tracing

    return Tracing(args.trace, faults=args.trace_faults, el2=args.trace_el2)


def check_options(args: argparse.Namespace) -> None:
    """Raise UsageError for options that make no sense together, whatever the host and the kernel's file are."""
    _refuse_contradictions(args)
    _config(args, _kernel(args)).check()


def _refuse_contradictions(args: argparse.Namespace) -> None:
    """Raise UsageError for options about this side of a run that make no sense together."""
    if getattr(args, "reboot", False):
        for option in ("restore", "gdb", "map", "trace"):
            if getattr(args, option) is not None:
                raise UsageError(f"--reboot with --{option}: that is about one VM, and a reset makes another")
    if args.restore is not None and args.dump_dtb is not None:
        raise UsageError("--dump-dtb with --restore: the device tree was made long ago, and is not in the snapshot")
    for option in ("faults", "el2"):
        if args.trace is None and getattr(args, f"trace_{option}"):
            raise UsageError(
                f"--trace-{option} says what goes into a trace, but no file for it is named", hint="--trace FILE"
            )


def ready(args: argparse.Namespace) -> str:
    """Return the kernel to run. Raises UsageError where it is not one, HostError where no guest can run."""
    _refuse_contradictions(args)
    kernel = _kernel(args)
    require_arm64(args, "pyvmm's guests are arm64: KVM runs guests of its own architecture")
    from pyvmm._native_source import require_fresh_native

    require_fresh_native()
    return kernel


def dry_run(args: argparse.Namespace) -> int:
    """Print the plan of the machine, for any verb that would run it; returns 0."""
    if args.restore is not None:
        raise UsageError("--dry-run with --restore: what is planned is a machine from its start")
    _refuse_contradictions(args)
    kernel = _kernel(args)
    from pyvmm._native_source import require_fresh_native

    require_fresh_native()
    from pyvmm.machine.plan import Plan

    with Plan(found(_config(args, kernel))) as plan:
        if args.dump_dtb is not None:
            _write(args.dump_dtb, plan.machine.entry.described())
        print("\n".join(plan.lines()))
    return 0


def run_guest(args: argparse.Namespace, kernel: str, watch: Watch | None = None, *, reboot: bool = False) -> int:
    """Run ``kernel`` as the options say, ``watch`` looking on, to its end; returns the exit status.

    With ``reboot`` a reset by the guest is no end: the VM is destroyed, and another one starts in its place.
    """
    from pyvmm.machine.machine import Machine
    from pyvmm.session.control import Control
    from pyvmm.session.report import report, report_json
    from pyvmm.session.requests import Requests
    from pyvmm.session.terminal import Keys, Signals, in_foreground
    from pyvmm.vcpu.outcome import Ending

    with contextlib.ExitStack() as stack:
        # Between two lives of the guest too: its last one may have left no room for what the next one's start says.
        unread = stack.enter_context(contextlib.ExitStack())
        unread.enter_context(log.never_waiting())
        signals = stack.enter_context(Signals())
        if watch is not None:
            stack.enter_context(watch)
        stdout = STDOUT if watch is None else watch.console
        ends = [open_place(where, stack, stdout, keep=args.restore is not None) for where in places(args)]
        for number, (out, source) in enumerate(ends):
            if source is not None and os.isatty(source):
                # In the background the terminal is not ours to read: it would stop us.
                keys = Keys(source, lambda: signals.end("Ctrl-A x")) if in_foreground(source) else None
                ends[number] = out, nobody(stack) if keys is None else stack.enter_context(keys).fd
        debugger = None
        if args.gdb is not None:
            from pyvmm.debug.server import GdbServer

            debugger = stack.enter_context(GdbServer(args.gdb))
        config, snapshot = _config(args, kernel, *ends), None
        if args.restore is None:
            config = found(config)
        else:
            from pyvmm.machine.snapshot import Snapshot

            snapshot = stack.enter_context(Snapshot(args.restore))
        intercept = debugger.intercept if debugger else None
        requests = Requests(options=lambda: _machine_options(args))
        stack.enter_context(Control(requests.verbs, args.socket))
        while True:
            with Machine(config, intercept=intercept, start=snapshot) as machine, contextlib.ExitStack() as life:
                if args.dump_dtb is not None:
                    _write(args.dump_dtb, machine.entry.described())
                if watch is not None:
                    watch.begin(machine)
                signals.stop = machine.stop
                if debugger is not None:
                    life.enter_context(debugger.serving(machine))
                with requests.about(machine), following_size(machine, ends[1][0]):
                    if asked := signals.asked or requests.asked:  # before there was this machine
                        machine.stop(asked)
                    outcome = machine.run()
                # A wish for the end that came too late to be this VM's is for the next one.
                if not reboot or outcome.ending is not Ending.RESET or signals.asked or requests.asked:
                    if debugger is not None:
                        debugger.ended(outcome)
                    try:
                        # What is said from here on is what the user waits for: it waits for the user.
                        unread.close()
                        if watch is not None:
                            watch.end(outcome)
                    finally:
                        say = report_json if args.log_json else report
                        say(outcome, machine.counters, table=args.stats)
                    return outcome.status if signals.received is None else 128 + signals.received
            # A protected VM's memory cannot be loaded again: a reset makes another VM, for every protection alike.
            config = _rest_of(config, machine.elapsed_ns)
            # A machine is full of cycles, and nobody else looks for garbage as often as a guest may reset.
            del machine, life
            gc.collect()


def _machine_options(args: argparse.Namespace) -> str:
    from pyvmm.options.file import machine_options  # for the few runs that are saved

    return machine_options(args)


def _rest_of(config: MachineConfig, spent_ns: int) -> MachineConfig:
    """Return the machine to go on with after one that ran so long: what is left of its deadline."""
    if config.deadline is None:
        return config
    return config._replace(deadline=max(config.deadline - spent_ns / 1e9, 1e-3))


def _kernel(args: argparse.Namespace) -> str:
    given = [kernel for kernel in (args.kernel, args.kernel_option) if kernel is not None]
    if len(given) != 1:
        what = "no KERNEL given" if not given else f"two kernels given, {given[0]} and {given[1]}"
        raise UsageError(what, hint="pyvmm run payload:hello runs a built-in one")
    return str(given[0])


def _config(
    args: argparse.Namespace, kernel: str, serial: Ends = (None, None), console: Ends = (None, None)
) -> MachineConfig:
    from pyvmm.guest.kernels import MEMORY, is_kernel
    from pyvmm.machine import layout
    from pyvmm.machine.config import MachineConfig, usual_backing

    places(args)
    size, gpa = args.mem
    if gpa is not None and gpa != layout.RAM_BASE:
        raise UsageError(f"memory at gpa {hex_(gpa)}: this machine's memory starts at {hex_(layout.RAM_BASE)}")
    protection = Protection(args.protection)
    return MachineConfig(
        kernel=kernel,
        protection=protection,
        memory=(MEMORY if is_kernel(kernel) else DEFAULT_MEMORY) if size is None else size,
        cpus=args.cpus,
        params=params(kernel, args.params),
        initrd=args.initrd,
        backing=args.backing or usual_backing(protection),
        prefault=args.prefault,
        conversion=ConversionPolicy(args.conversion),
        dtb=args.dtb,
        deadline=args.deadline,
        serial_out=serial[0],
        serial_in=serial[1],
        devices=device_specs(args, console),
        swiotlb=args.swiotlb,
    )


def found(config: MachineConfig) -> MachineConfig:
    """Return it with files for names of kernels and initramfs. Raises HostError where there is none."""
    from pyvmm.guest.kernels import resolve

    def make(name: str) -> str:
        from pyvmm.lab.guests import made

        return made(name)

    kernel, initrd = resolve(config.kernel, config.initrd, make)
    return config._replace(kernel=kernel, initrd=initrd)


def params(kernel: str, given: list[str]) -> tuple[str, ...]:
    """Return the guest's parameters; a bare word for the crash payload is the way it is to crash."""
    if kernel != CRASH:
        return tuple(given)
    return tuple(f"way={text}" if text and "=" not in text and " " not in text else text for text in given)


def _write(path: str, data: bytes) -> None:
    with open(open_output(path), "wb") as file:
        try:
            file.write(data)
            file.flush()
        except OSError as error:
            raise PyvmmError(f"{path!r} cannot be written: {error.strerror}") from None
