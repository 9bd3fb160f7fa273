#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# The lab's init: what a program expects of a Linux machine, then the agent as PID 1.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mkdir -p /dev/pts /dev/shm
/bin/busybox mount -a
/bin/busybox ifconfig lo up
/bin/busybox modprobe -a 9p 9pnet_virtio
export PATH=/usr/bin:/usr/sbin HOME=/root LANG=C.UTF-8
exec /usr/bin/python3 -P -c 'import sys; sys.path.insert(0, "/pyvmm/agent"); from pyvmm.lab import agent; agent.main()'
