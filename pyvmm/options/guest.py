# SPDX-License-Identifier: Apache-2.0
"""The options of every verb that runs a guest: which guest, how, and what to keep of it. One table, in --help's order.

The command line's parser and files of options are both made from it; :mod:`pyvmm.syntax.option` tells what an entry
says.
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
        help="arm64 Image (plain, gzip or EFI zboot of gzip), ELF, flat binary, payload:NAME, debian: or debian:stable "
        "(Debian's kernels that the lab has), or own: (of pyvmm lab kernel)",
    ),
    Option("-k", "--kernel", dest="kernel_option", says="kernel", metavar="KERNEL", help="the same, as an option"),
    Option(
        "-i",
        "--initrd",
        "--initramfs",
        metavar="FILE",
        help="initial root file system; or shell:, a shell on the console, or the command behind ' -- ' in the params",
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
        help="give the guest this device tree as it is, not one that describes the machine (--dump-dtb writes that); "
        "where the initrd is, it must say itself",
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
        help="what guest memory is: anonymous memory (default, but for emulated), which most hosts back by huge pages,"
        " a memfd, one with huge pages, or a guest_memfd",
    ),
    Option(
        "--prefault",
        group="machine",
        takes=FLAG,
        about=RUN,
        help="populate all memory before the start, in huge pages where the host gives them: first touches cost less",
    ),
    Option(
        "--deadline",
        group="machine",
        metavar="SECONDS",
        type=parse_seconds,
        about=RUN,
        help="end the run then, with status 4",
    ),
    Option(
        "--socket",
        group="machine",
        metavar="PATH",
        about=RUN,
        help="make a socket there for pyvmm ctl, besides the one that every run has",
    ),
    Option(
        "--gdb",
        group="machine",
        metavar="WHERE",
        about=RUN,
        help="wait for gdb before the guest's first instruction: a unix socket's path, or tcp:[HOST:]PORT (HOST is "
        "127.0.0.1 unless said); WHERE,nowait does not wait",
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

# Only one of the first three: who asks for protection must not get a plain VM because another flag came later.
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
            help="the same as --protection pkvm",
        )
        for alias in ("--protected-vm", "--pkvm")
    ),
    Option(
        "--conversion",
        group="protection",
        choices=CONVERSIONS,
        default="preserve",
        help="what becomes of a page's contents when it changes hands (emulated only; default preserve)",
    ),
)

CONFIGURATION: Final = (
    Option(
        "--config",
        group="configuration",
        metavar="FILE.toml",
        about=INVOCATION,
        help="options from a file: long names as keys; what is said here goes first",
    ),
    Option(
        "--print-config",
        group="configuration",
        takes=FLAG,
        about=INVOCATION,
        help="print such a file of these options, run nothing",
    ),
    Option(
        "--restore",
        group="configuration",
        metavar="FILE",
        about=INVOCATION,
        help="go on from a snapshot (pyvmm ctl snapshot), which brings kernel and options",
    ),
    Option(
        "--dry-run",
        group="configuration",
        takes=FLAG,
        about=INVOCATION,
        help="print what the machine would be, and every ioctl that would make it; needs no KVM, on any workstation",
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
    Option("--stats", group="output", takes=FLAG, about=RUN, help="end with a table of exits and what they cost"),
    Option(
        "--map",
        group="output",
        metavar="FILE.svg",
        type=OutputPath,
        about=RUN,
        help="draw guest memory as it is at the end, and what happened to it: faults (root only), shares, conversions",
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
        help="and the guest's faults (root only); costs some 5 %% of an exit",
    ),
    Option(
        "--trace-el2",
        group="output",
        takes=FLAG,
        about=RUN,
        help="and when the hypervisor ran (root only, on a kernel that tells: --lab --host-kernel own); costs more",
    ),
)

GUEST_OPTIONS: Final = (*WHICH, *MACHINE, *DEVICE_OPTIONS, *PROTECTION, *CONFIGURATION, *OUTPUT)
