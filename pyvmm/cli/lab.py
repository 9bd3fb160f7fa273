# SPDX-License-Identifier: Apache-2.0
"""``pyvmm lab``: run a pKVM host on any Linux machine. Also implements ``pyvmm --lab VERB``.

The lab writes to stderr only. stdout belongs to the command.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyvmm.cli.common import add_common, add_messages
from pyvmm.errors import HostError, UsageError
from pyvmm.interrupt import terminable
from pyvmm.labenv import in_lab
from pyvmm.syntax.paths import find_outputs
from pyvmm.syntax.values import parse_count, parse_seconds, parse_size
from pyvmm.terminal import clean, in_background, say

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pyvmm.lab import LabOptions
    from pyvmm.lab.cache import Image
    from pyvmm.lab.ownkernel import OwnKernel, Variant
    from pyvmm.lab.peers import Prepared
    from pyvmm.lab.stream import Sink

BEFORE = "--lab-"
HOST_KERNEL = "host-kernel"
COST = "5 to 10 minutes each on 2 CPUs, 170 MB of downloads, 1.2 GB of disk meanwhile, 20 MB afterwards"
"""The cost of building the kernels."""
MODES = ("protected", "nvhe", "vhe", "no-el2")
GICS: dict[str, dict[str, Any]] = {"2": {"gic": 2}, "3": {}, "no-its": {"its": False}, "none": {"gic": 0}}
BOOTS = ("saved", "fresh")
STDIN = 0


def add_lab_options(group: argparse._ArgumentGroup, prefix: str = BEFORE) -> None:
    """Add the options of a lab. Before a verb their names begin with ``--lab-``."""
    add_host_kernel(group, *([f"{prefix}{HOST_KERNEL}"] if prefix == BEFORE else []))

    def add(name: str, **how: Any) -> None:
        group.add_argument(f"{prefix}{name}", dest=f"lab_{name.replace('-', '_')}", **how)

    add(
        "mode", choices=MODES, default="protected", help="KVM's mode on the lab's kernel, or no-el2: no KVM (protected)"
    )
    add(
        "gic",
        choices=GICS,
        default="3",
        help="version of the host's interrupt controller; no-its: 3 without an ITS; none: guests get none (3)",
    )
    add(
        "cpu",
        metavar="NAME",
        help="QEMU's name of the host's CPU, such as neoverse-n1 or max (by the mode and QEMU's version)",
    )
    add("icount", action="store_true", help="derive time from the instruction count: repeatable measurements; one CPU")
    add("cpus", type=parse_count, metavar="N", help="CPUs of the lab (2; 1 with icount)")
    add("mem", type=parse_size, default=2048 << 20, metavar="SIZE", help="memory of the lab, MiB or 2G (2G)")
    add("console", action="store_true", help="show the lab's console on stderr")
    help_with = (
        "show NAME there: Debian's passt, gdb, e2fsprogs or qemu, on PATH, fetched once; kvmtool, built once; or a "
        "guest's kernel, debian: or own:; may be repeated"
    )
    add("with", action="append", default=[], metavar="NAME", help=help_with)
    add(
        "boot",
        choices=BOOTS,
        default="saved",
        help="start from a saved boot (the first start saves it); or boot afresh",
    )
    add("boot-timeout", type=parse_seconds, default=180.0, metavar="SECONDS", help="give up after (180)")


def add_host_kernel(parser: argparse._ActionsContainer, *aliases: str) -> None:
    """Add the choice of the kernel that the lab's host runs."""
    parser.add_argument(
        f"--{HOST_KERNEL}",
        *aliases,
        dest="lab_host_kernel",
        metavar="NAME|FILE",
        help="the lab's kernel: Debian's stable, backports (the default), unstable or experimental, of which the last "
        "two may be older than the default, each with -16k for pages of 16 KiB; own, the project's (see pyvmm lab "
        "kernel); or a file with an arm64 Image",
    )


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Define the verb's actions and their options."""
    parser = subparsers.add_parser(
        "lab",
        help="a pKVM host on any Linux machine",
        allow_abbrev=False,
        description="An emulated arm64 machine whose kernel is a pKVM host. The lab's own messages go to "
        "stderr; stdout belongs to the command.",
    )
    add_common(parser)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, dest="lab_action")

    build = actions.add_parser("build", help="build the lab's image if it is missing", allow_abbrev=False)
    build.add_argument("--refresh", action="store_true", help="fetch the archive's newest list, and check the image")
    add_host_kernel(build)

    kernel = actions.add_parser(
        "kernel",
        help="build the project's own kernel if it is missing",
        allow_abbrev=False,
        description="Build the kernel that --host-kernel own boots, whose hypervisor can be traced, and own:, the one "
        f"for protected guests, both from Debian's linux-source. That takes {COST}.",
    )
    kernel.add_argument("--refresh", action="store_true", help="look for a newer source in the archive")

    status = actions.add_parser("status", help="show what is built and what is missing", allow_abbrev=False)
    status.add_argument("--json", action="store_true", help="print it as JSON")

    run = actions.add_parser("run", help="run a pyvmm verb in a lab, as pyvmm --lab does", allow_abbrev=False)
    execute = actions.add_parser("exec", help="run any command in a lab", allow_abbrev=False)
    shell = actions.add_parser("shell", help="a shell in a lab", allow_abbrev=False)
    for action in (run, execute, shell):
        add_lab_options(action.add_argument_group("the lab"), "--")
    for action in (build, kernel, status, run, execute, shell):
        add_messages(action)
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="VERB ...", help="the verb and its arguments")
    execute.add_argument("-t", "--tty", action="store_true", help="give the command a terminal")
    execute.add_argument("command", nargs=argparse.REMAINDER, metavar="[--] COMMAND ...", help="the command")


def main(args: argparse.Namespace) -> int:
    """Run the action and return its exit status, or that of the command that it ran."""
    command: list[str] = getattr(args, "command", [])
    if command[:1] == ["--"]:
        command = command[1:]
    match args.lab_action:
        case "build":
            return _build(_kernel(args), refresh=args.refresh)
        case "kernel":
            return _build_kernels(refresh=args.refresh)
        case "status":
            from pyvmm.lab.status import print_status

            return print_status(as_json=args.json)
        case "shell":
            return _run(["/bin/sh", "-i"], args, is_tty=os.isatty(STDIN), live=True)
        case action if not command:
            raise UsageError(f"pyvmm lab {action}: no command given", hint=f"pyvmm lab {action} --help")
        case "run":
            return _run_unparsed(command, args)
        case _:
            from pyvmm.lab.shares import workstation_files

            return _run(command, args, is_tty=args.tty, files=workstation_files(Path.cwd(), command))


def run_verb(
    argv: list[str],
    args: argparse.Namespace,
    *,
    outputs: Sequence[str] | None = None,
    stdout: Sink | None = None,
    visible: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> int:
    """Run ``pyvmm ARGV`` in a new lab, and return its exit status.

    The lab sees the files that it names, and the packages of its plug-ins (see pyvmm.plugins). Files it writes to
    ``outputs``, by default the OutputPaths among ``args``, are here afterwards. Its output goes to our stdout, or to
    ``stdout``. ``visible`` are more paths that the lab sees, ``env`` more variables.
    """
    _refuse_debugger(args)
    is_tty = stdout is None and all(map(os.isatty, (STDIN, 1, 2))) and not in_background(STDIN)
    if outputs is None:
        outputs = find_outputs(args)
    return _run(
        ["pyvmm", *argv],
        args,
        is_tty=is_tty,
        is_module=True,
        files=[*argv, *visible],
        outputs=outputs,
        stdout=stdout,
        env=env,
    )


def _refuse_debugger(verb: argparse.Namespace) -> None:
    """Raise UsageError for a guest that would wait for a debugger that cannot reach it."""
    if getattr(verb, "gdb", None) is not None:
        raise UsageError(
            "--gdb with --lab: no debugger can connect from outside the lab",
            hint="run both in one lab: pyvmm lab shell --with gdb",
        )


def _run_unparsed(command: list[str], args: argparse.Namespace) -> int:
    """Run a verb given as words. It is parsed here to learn which files it writes."""
    from pyvmm.cli import make_parser, refuse_lab_options

    try:
        verb = make_parser(command).parse_args(command)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 2
    if verb.lab or verb.verb == "lab":
        raise UsageError("already in the lab: run the command without it", hint=f"pyvmm {shlex.join(command)}")
    refuse_lab_options(verb, command)
    _refuse_debugger(verb)
    return run_verb(command, args, outputs=find_outputs(verb))


def _run(
    command: list[str],
    args: argparse.Namespace,
    *,
    is_tty: bool,
    is_module: bool = False,
    files: Sequence[str] = (),
    outputs: Sequence[str] = (),
    live: bool = False,
    stdout: Sink | None = None,
    env: Mapping[str, str] | None = None,
) -> int:
    from pyvmm import plugins
    from pyvmm.guest.kernels import named
    from pyvmm.lab import Lab
    from pyvmm.lab.lab import standard_sink
    from pyvmm.lab.needs import require
    from pyvmm.lab.progress import Ticker, showing
    from pyvmm.lab.shares import find_shares
    from pyvmm.lab.staging import staged

    if is_tty and (in_background(STDIN) or not os.isatty(STDIN)):
        why = "the terminal is another job's" if os.isatty(STDIN) else "stdin is not a terminal"
        raise UsageError(f"{why}, but a terminal was requested")
    options = _options(args)
    wanted = list(dict.fromkeys([*getattr(args, "lab_with", []), *named(files, ("passt",))]))
    if wanted:
        from pyvmm.lab import peers  # most labs see no packages

        peers.check(wanted)
    find_shares(Path.cwd(), files, outputs)  # reports paths that cannot be shared now, not after an image was built
    if in_lab():
        raise HostError(
            "already in the lab, and its kernel does not run protected guests",
            hint="use the default host kernel, in the mode protected",
        )
    require(building=False)
    with terminable(), staged(plugins.asked()) as packages:
        image = _image(_kernel(args), refresh=False)
        _tell_age(_kernel(args), image)
        if wanted:
            from pyvmm.lab import peers

            with showing() as progress:
                trees = peers.require(wanted, progress=progress)
            files = [*files, *trees.paths]
            env = peers.joined(trees.environment, env or {})
        lab = Lab(options, image=image, arguments=files, outputs=outputs, packages=packages, live=live)
        with Ticker("starting the lab") as ticker, lab:
            out, err = stdout or standard_sink(sys.stdout), standard_sink(sys.stderr)
            if is_module:
                ticker.what = f"pyvmm {command[1]} in the lab"  # until it says something
                out, err = _after(ticker.end, out), _after(ticker.end, err)
            else:
                ticker.end()
            # A background job that reads its terminal is stopped.
            stdin = b"" if in_background(STDIN) else STDIN
            return lab.run(command, stdin=stdin, stdout=out, stderr=err, is_tty=is_tty, is_module=is_module, env=env)


def _after(first: Callable[[], None], sink: Sink) -> Sink:
    """Return a sink that calls a function before it takes its first bytes."""

    def take(data: bytes) -> object:
        first()
        return sink(data)

    return take


def _options(args: argparse.Namespace) -> LabOptions:
    from pyvmm.lab import LabOptions

    if not hasattr(args, "lab_mode"):  # a verb that uses the lab by itself
        return LabOptions()
    return LabOptions(
        mode=args.lab_mode,
        cpus=args.lab_cpus or (1 if args.lab_icount else 2),
        memory=args.lab_mem >> 20,
        icount=args.lab_icount,
        boot_timeout=args.lab_boot_timeout,
        verbose=args.lab_console,
        boot=args.lab_boot,
        cpu=args.lab_cpu,
        **GICS[args.lab_gic],
    )


def _kernel(args: argparse.Namespace) -> str:
    from pyvmm.lab import kernels

    return getattr(args, "lab_host_kernel", None) or kernels.DEFAULT


def _build(kernel: str, *, refresh: bool) -> int:
    with terminable():
        image = _image(kernel, refresh=refresh, thorough=True)
    _tell_age(kernel, image)
    print(clean(f"{image.release}, built {image.manifest.built}, {image.size / 1e6:.0f} MB in {image.directory}"))
    return 0


def _tell_age(kernel: str, image: Image) -> None:
    from pyvmm.lab.image import age_note

    if (note := age_note(kernel, image)) is not None:
        say(f"pyvmm: the lab's kernel {note}")


def _build_kernels(*, refresh: bool) -> int:
    from pyvmm.lab.ownkernel import Variant

    with terminable():
        kernels = _own_kernels(tuple(Variant), refresh=refresh, thorough=True)
    for variant, kernel in kernels.items():
        print(clean(f"{variant}: {kernel.told()}"))
        if kernel.manifest.refused:
            say(f"pyvmm: this source did not accept these options: {' '.join(kernel.manifest.refused)}")
    return 0


def prepare_peers() -> Prepared:
    """Build or fetch what a benchmark's peers need, showing progress, and report the missing peers."""
    from pyvmm.lab import peers
    from pyvmm.lab.progress import showing

    with showing() as progress:
        prepared = peers.prepare(progress=progress)
    for name, why in prepared.lacking.items():
        say(f"pyvmm: bench: no {name}: {why}")
    return prepared


def _own_kernels(variants: Sequence[Variant], *, refresh: bool, thorough: bool) -> dict[Variant, OwnKernel]:
    """Return the project's own kernels. If one is missing, build it and show progress."""
    from pyvmm.lab.needs import require_for_kernel
    from pyvmm.lab.ownkernel import build_kernels, usable_kernel
    from pyvmm.lab.progress import showing

    there = {each: kernel for each in variants if (kernel := usable_kernel(variant=each, thorough=thorough))}
    missing = [each for each in variants if each not in there]
    if not refresh and not missing:
        return there
    require_for_kernel()
    if missing:
        print(
            f"pyvmm: building the project's own kernel for {' and '.join(missing)} from Debian's source; this is done "
            f"once, and takes {COST}",
            file=sys.stderr,
        )
    else:
        print("pyvmm: looking for a source newer than that of the existing kernel", file=sys.stderr)
    started = time.monotonic()
    with showing() as progress:
        kernels = build_kernels(refresh=refresh, wanted=variants, progress=progress)
    print(f"pyvmm: the kernel is ready, {time.monotonic() - started:.0f} s", file=sys.stderr)
    return kernels


def _image(kernel: str, *, refresh: bool, thorough: bool = False) -> Image:
    """Return the kernel's image. If it is missing, build it and show progress."""
    from pyvmm.lab import build_image, kernels
    from pyvmm.lab.image import usable_image
    from pyvmm.lab.needs import require
    from pyvmm.lab.ownkernel import Variant
    from pyvmm.lab.progress import showing

    if kernel == kernels.OWN:
        _own_kernels((Variant.HOST,), refresh=refresh, thorough=thorough)
    if not refresh and (image := usable_image(kernel=kernel, thorough=thorough)):
        return image
    require(building=True)
    say(f"pyvmm: building the lab's image from Debian's packages ({kernel}); this is done once")
    started = time.monotonic()
    with showing() as progress:
        image = build_image(kernel, refresh=refresh, progress=progress)
    say(f"pyvmm: the lab's image is ready, {time.monotonic() - started:.0f} s: {image.release}")
    return image
