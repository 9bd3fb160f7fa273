#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# A guest's init: a shell on the kernel's console that ends with the guest, or one command and its exit status.
#
# The command is what stands behind " -- " on the kernel's command line, or pyvmm.run="COMMAND" on it.

end() {
    trap '' USR1 USR2 TERM
    while read -r source where rest; do
        case $source in
        /dev/*) umount -r "$where" ;;
        esac
    done </proc/mounts
    sync
    timeout 10 stty opost </dev/console >/dev/null 2>&1  # returns once everything has been sent
    "$1" -f
}

# Process 1 waits for the shell and can do nothing else meanwhile. Of halt, poweroff and reboot, busybox's send what
# they want done to a process called linuxrc if there is one: this script again, by its other name.
if [ "$0" = /linuxrc ]; then
    trap 'end poweroff' USR1 USR2
    trap 'end reboot' TERM
    sleep 2147483647 &
    wait
    exit
fi

/bin/busybox mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=linux PS1='\w # '
cd /root

# Of a kernel with modules those for the devices that there are: each costs a guest memory and time.
if [ -d /lib/modules ]; then
    modprobe virtio_mmio 2>/dev/null
    wanted=
    for device in /sys/bus/virtio/devices/*/device; do
        id=
        [ -e "$device" ] && read -r id <"$device"
        case $id in
        0x0001) wanted="$wanted virtio_net" ;;
        0x0002) wanted="$wanted virtio_blk crc32c_generic ext4" ;;
        0x0004) wanted="$wanted virtio_rng" ;;
        0x0005) wanted="$wanted virtio_balloon" ;;
        0x0013) wanted="$wanted vmw_vsock_virtio_transport" ;;
        esac
    done
    for module in $wanted; do
        case $module in
        crc32c_generic) modprobe -q $module 2>/dev/null ;;  # not a module in every kernel
        *) modprobe $module ;;
        esac
    done
fi

consoles=
read -r consoles </sys/class/tty/console/active
tty=/dev/${consoles##* }
[ -c "$tty" ] || tty=/dev/null

read -r line </proc/cmdline
command=
case " $line" in
*' -- '*)
    command=${line#*-- }
    ;;
*' pyvmm.run="'*)
    command=${line#*pyvmm.run=\"}
    command=${command%%\"*}
    ;;
*' pyvmm.run='*)
    command=${line#*pyvmm.run=}
    command=${command%% *}
    ;;
esac

# When the leader of a session ends, the kernel drops what the console has not sent yet. So the leader waits for that. A
# Ctrl-C is for what it runs.
leader='trap : INT QUIT
"$@"
status=$?
trap "" TTOU
stty opost >/dev/null 2>&1
exit $status'

if [ -n "$command" ]; then
    setsid -c sh -c "$leader" sh sh -c "$command" <"$tty" >"$tty" 2>&1
    status=$?
    printf '\npyvmm: exit status %d\n' $status >"$tty"
else
    /linuxrc &
    setsid -c sh -c "$leader" sh sh -i <"$tty" >"$tty" 2>&1
fi
end poweroff
