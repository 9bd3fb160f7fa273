# SPDX-License-Identifier: Apache-2.0
"""Make two vCPUs call the hypervisor at the same moment, repeatedly. Separate orders cannot do that.

This module has no claims. The guest runs code that waits before every call until the other vCPU is ready.
"""

from __future__ import annotations

from pyvmm.experiment import Experiment
from pyvmm.guest.orders import signed
from pyvmm.guest.puppet import Puppet
from pyvmm.pages import HOST_PAGE

CODE = (
    0xA940_4009,  # ldp x9, x16, [x0]     the first page, and which call
    0x9100_400B,  # add x11, x0, #16      where the answers go
    0x1000_7F8A,  # adr x10, . + 0xff0    how often either vCPU has come to the meeting point
    0xD280_000C,  # mov x12, #0
    0x9100_098C,  # 1: add x12, x12, #2
    0xC85F_FD4E,  # 2: ldaxr x14, [x10]
    0x9100_05CE,  # add x14, x14, #1
    0xC80F_FD4E,  # stlxr w15, x14, [x10]
    0x35FF_FFAF,  # cbnz w15, 2b
    0xC8DF_FD4E,  # 3: ldar x14, [x10]
    0xEB0C_01DF,  # cmp x14, x12
    0x54FF_FFC3,  # b.lo 3b
    0xAA10_03E0,  # mov x0, x16
    0xAA09_03E1,  # mov x1, x9
    0xD280_0002,  # mov x2, #0
    0xD280_0003,  # mov x3, #0
    0xD400_0002,  # hvc #0
    0xF800_8560,  # str x0, [x11], #8
    0x9140_0129 | HOST_PAGE >> 12 << 10,  # add x9, x9, a page
    0xF100_019F,  # cmp x12, #0, which is to be twice the pages
    0x54FF_FE03,  # b.lo 1b
    0xD65F_03C0,  # ret
)
COMPARE = CODE.index(0xF100_019F)
MEETING = 0xFF8
"""Where in the code's page the count is that ``adr`` names."""
ROWS = (0x400, 0x800)
"""Where in it each vCPU's first page, its call and the answers are."""
PATIENCE = 30.0

Answers = list[tuple[int, ...]]
"""Both vCPUs' answers for each page, in turn."""


def together(x: Experiment, vcpus: tuple[Puppet, Puppet], call: int, ranges: tuple[int, int], pages: int) -> Answers:
    """Have each vCPU make a call for up to 64 pages of its range, both at the same time. Returns the answers."""
    code = x.page()
    for number, word in enumerate(CODE):
        x.guest.write(code + 4 * number, word | (2 * pages << 10 if number == COMPARE else 0), 4)
    x.guest.write64(code + MEETING, 0)
    for row, gpa in zip(ROWS, ranges, strict=True):
        x.guest.write64(code + row, gpa)
        x.guest.write64(code + row + 8, call)
    x.guest.flush(code, 4 * len(CODE))
    orders = [vcpu.start_execute(code, code + row) for vcpu, row in zip(vcpus, ROWS, strict=True)]
    for order in orders:
        order.result(PATIENCE)
    answers = [[signed(word) for word in x.guest.words(code + row + 16, pages)] for row in ROWS]
    return list(zip(*answers, strict=True))
