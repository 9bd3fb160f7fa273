# SPDX-License-Identifier: Apache-2.0
"""Options that describe a device: their parts, and the errors for wrong ones."""

from __future__ import annotations

import argparse

import pytest

from pyvmm.syntax.parts import Parts
from pyvmm.syntax.values import parse_count

PARTS = Parts({"path": str, "ro": None, "queues": parse_count, "cache": str}, main="path")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("disk.img", {"path": "disk.img"}),
        ("path=disk.img", {"path": "disk.img"}),
        ("disk.img,ro,queues=4", {"path": "disk.img", "ro": True, "queues": 4}),
        ("queues=4,path=a=b,cache=off", {"queues": 4, "path": "a=b", "cache": "off"}),
        ("ro", {"ro": True}),
        ("", {}),
    ],
)
def test_parts_are_separated(text: str, values: dict[str, object]) -> None:
    assert PARTS(text) == values


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("disk.img,rw", "'rw' in 'disk.img,rw' is not known; known are path=, ro, queues=, cache="),
        ("disk.img,readonly=on", "'readonly' in 'disk.img,readonly=on' is not known"),
        ("a.img,path=b.img", "path is twice"),
        ("ro=yes,path=a", "ro takes no value"),
        ("a.img,queues", "queues needs a value: queues=..."),
        ("a.img,queues=", "queues in 'a.img,queues=' is empty"),
        ("a.img,queues=0", "queues in 'a.img,queues=0': '0' is not a count"),
        (",ro", "path in ',ro' is empty"),
        ("a.img,", "'' in 'a.img,' is not known"),
    ],
)
def test_errors_name_the_wrong_part(text: str, said: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        PARTS(text)
    assert said in str(raised.value)
