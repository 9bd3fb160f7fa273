# SPDX-License-Identifier: Apache-2.0
"""linux/if_tun.h: taps. linux/sockios.h: requests to bring one up and give it an address."""

from __future__ import annotations

from ctypes import c_int, c_uint

from pyvmm.uapi.ioctl import IOR, IOW

TUNSETIFF = IOW("TUNSETIFF", ord("T"), 202, c_int)
"""Takes a ``struct ifreq``, unlike its definition."""
TUNSETPERSIST = IOW("TUNSETPERSIST", ord("T"), 203, c_int)
"""Takes 0 or 1 itself."""
TUNGETFEATURES = IOR("TUNGETFEATURES", ord("T"), 207, c_uint)
TUNSETOFFLOAD = IOW("TUNSETOFFLOAD", ord("T"), 208, c_uint)
"""Takes the flags themselves."""
TUNSETVNETHDRSZ = IOW("TUNSETVNETHDRSZ", ord("T"), 216, c_int)

IFF_TUN = 0x0001
IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_TSO_ECN = 0x08

SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
SIOCSIFADDR = 0x8916
SIOCSIFNETMASK = 0x891C
SIOCSIFHWADDR = 0x8924
