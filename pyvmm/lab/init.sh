#!/bin/busybox sh
# The lab's init: what a program expects of a Linux machine, then the agent as PID 1.
mount() { /bin/busybox mount "$@"; }
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
/bin/busybox mkdir -p /dev/pts /dev/shm
mount -t devpts -o ptmxmode=666 devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
/bin/busybox ifconfig lo up
while read -r module; do
    /bin/busybox insmod "/lib/modules/$module"
done </lib/modules/order
export PATH=/usr/bin:/usr/sbin HOME=/root
exec /usr/bin/python3 -I -S -c 'import sys; sys.path.insert(0, "/pyvmm"); import agent; agent.main()'
