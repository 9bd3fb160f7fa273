# SPDX-License-Identifier: Apache-2.0
"""The options of every verb that runs a guest: which guest, how, and what to record. One table, in --help's order.

The command line's parser and options files are both made from it. :mod:`pyvmm.syntax.option` describes an entry.
"""

from __future__ import annotations

from pyvmm.memory.choices import BACKINGS, CONVERSIONS
from pyvmm.options.devices import DEVICE_OPTIONS
from pyvmm.protection import PROTECTIONS
from pyvmm.syntax.option import FLAG, INVOCATION, RUN, SEVERAL, Option
from pyvmm.syntax.paths import OutputPath, output_behind, whole_path
from pyvmm.syntax.values import parse_count, parse_memory, parse_seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

WHICH: Final = (
    Option(
        "kernel",
        metavar="KERNEL",
        help="arm64 Image (plain, gzip, xz, zstd, or EFI zboot of these), ELF, flat binary, payload:NAME, debian: or "
        "debian:stable (Debian's kernels from the lab), or own: (from pyvmm lab kernel)",
    ),
    Option("-k", "--kernel", dest="kernel_option", says="kernel", metavar="KERNEL", help="the same, as an option"),
    Option(
        "-i",
        "--initrd",
        "--initramfs",
        metavar="FILE",
        help="initial root file system; or shell: for a shell on the console or the command after ' -- ' in params",
    ),
    Option(
        "-p",
        "--params",
        "--cmdline",
        "--append",
        metavar="TEXT",
        takes=SEVERAL,
        help="kernel command line or payload parameters; may be repeated",
    ),
    Option(
        "--dtb",
        metavar="FILE",
        path=whole_path,
        reaches=lambda path: f"{path!r} to read",
        help="give the guest this device tree unchanged, instead of the generated one (see --dump-dtb); "
        "it must contain the initrd's address",
    ),
)

MACHINE: Final = (
    Option(
        "-m",
        "--mem",
        group="machine",
        metavar="SIZE[@GPA]",
        type=parse_memory,
        default=(None, None),
        help="memory: 512M, 1G, or MiB without a unit (64M; 256M for debian: and own:); it starts at 0x80000000",
    ),
    Option("-c", "--cpus", group="machine", metavar="N", type=parse_count, default=1, help="vCPUs (default 1)"),
    Option(
        "--backing",
        group="machine",
        choices=BACKINGS,
        help="kind of guest memory: anonymous (default, except with emulated), which most hosts back with huge pages,"
        " a memfd, a memfd with huge pages, or a guest_memfd",
    ),
    Option(
        "--pmu",
        group="machine",
        takes=FLAG,
        help="give the guest's CPUs the host's performance counters, for perf (protection none only)",
    ),
    Option(
        "--prefault",
        group="machine",
        takes=FLAG,
        about=RUN,
        help="populate all memory before the start, with huge pages where the host has them: first accesses cost less",
    ),
    Option(
        "--deadline",
        group="machine",
        metavar="SECONDS",
        type=parse_seconds,
        about=RUN,
        help="end the run after this time, with status 4",
    ),
    Option(
        "--socket",
        group="machine",
        metavar="PATH",
        about=RUN,
        help="make a second socket at PATH for pyvmm ctl, besides the one of every run",
    ),
    Option(
        "--gdb",
        group="machine",
        metavar="WHERE",
        about=RUN,
        help="wait for gdb before the guest's first instruction: a unix socket's path, or tcp:[HOST:]PORT (HOST is "
        "127.0.0.1 by default); WHERE,nowait does not wait",
    ),
    Option(
        "--serial",
        group="machine",
        metavar="WHERE",
        type=output_behind("file"),
        about=RUN,
        help="the UART, the console of most guests: stdio (default, unless --console has it), file=PATH, or none",
    ),
)

# Only one of the first three: a later flag must not turn a protected VM into a plain one.
PROTECTION: Final = (
    Option(
        "--protection",
        group="protection",
        choices=PROTECTIONS,
        default="none",
        alone=True,
        help="none (default); pkvm: by the hypervisor; emulated: the same calls, served and enforced by pyvmm",
    ),
    *(
        Option(
            alias,
            group="protection",
            takes=FLAG,
            dest="protection",
            const="pkvm",
            alone=True,
            help="short for --protection pkvm",
        )
        for alias in ("--protected-vm", "--pkvm")
    ),
    Option(
        "--conversion",
        group="protection",
        choices=CONVERSIONS,
        default="preserve",
        help="effect of a conversion on the page's contents (emulated only; default preserve)",
    ),
    Option(
        "--force",
        group="protection",
        takes=FLAG,
        about=RUN,
        help="start a protected Linux also where the host's pages are larger than 4 KiB, and it does not get far",
    ),
)

CONFIGURATION: Final = (
    Option(
        "--config",
        group="configuration",
        metavar="FILE.toml",
        about=INVOCATION,
        help="read options from FILE, long names as keys; the command line wins",
    ),
    Option(
        "--print-config",
        group="configuration",
        takes=FLAG,
        about=INVOCATION,
        help="print these options as such a file, and exit",
    ),
    Option(
        "--restore",
        group="configuration",
        metavar="FILE",
        about=INVOCATION,
        help="continue from a snapshot (pyvmm ctl snapshot), which has the kernel and the options",
    ),
    Option(
        "--verify",
        group="configuration",
        takes=FLAG,
        about=INVOCATION,
        help="with --restore: check all of the snapshot before the start, not each page when the guest reaches it",
    ),
    Option(
        "--trust-snapshot",
        group="configuration",
        takes=FLAG,
        about=INVOCATION,
        help="with --restore: open each disk, tap and socket that the snapshot names, even if the command line "
        "does not name it",
    ),
    Option(
        "--dry-run",
        group="configuration",
        takes=FLAG,
        about=INVOCATION,
        help="print the planned machine and every ioctl that would make it; works without KVM, on any workstation",
    ),
)

OUTPUT: Final = (
    Option(
        "--dump-dtb",
        group="output",
        metavar="FILE",
        type=OutputPath,
        about=RUN,
        help="write the guest's device tree to FILE, without the seeds of its random numbers",
    ),
    Option("--stats", group="output", takes=FLAG, about=RUN, help="print a table of exits and their costs at the end"),
    Option(
        "--map",
        group="output",
        metavar="FILE.svg",
        type=OutputPath,
        about=RUN,
        help="draw guest memory at the end, and its history: faults (root only), shares, conversions",
    ),
    Option(
        "--trace",
        group="output",
        metavar="FILE",
        type=OutputPath,
        about=RUN,
        help="record every exit, share and conversion for https://ui.perfetto.dev; costs less than 3 %% of an exit",
    ),
    Option(
        "--trace-faults",
        group="output",
        takes=FLAG,
        about=RUN,
        help="also record the guest's faults (root only); costs some 5 %% of an exit",
    ),
    Option(
        "--trace-el2",
        group="output",
        takes=FLAG,
        about=RUN,
        help="also record when the hypervisor ran (root only, on a kernel that traces it: --host-kernel own)",
    ),
)

GUEST_OPTIONS: Final = (*WHICH, *MACHINE, *DEVICE_OPTIONS, *PROTECTION, *CONFIGURATION, *OUTPUT)
