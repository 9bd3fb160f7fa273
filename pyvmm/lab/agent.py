# SPDX-License-Identifier: Apache-2.0
"""The lab's first process: mount directories, run one command at a time, and forward its streams and status.

Runs only inside the lab, as PID 1, from a package with only this module, ``frames`` and ``warm``. It has few imports,
because imports cost boot time. It owns the virtio-serial port and its children. When it dies, the kernel panics, QEMU
ends, and the workstation reports that.

A prepared agent has a warm interpreter, which has imported the modules that pyvmm's verbs need. A Python module then
runs in a fork of it. That fork leaves ``main`` by ``warm.Become``, so that it runs and ends as a separate program.
"""

from __future__ import annotations

import errno
import os
import select
import signal

from pyvmm.lab import frames, warm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

CHUNK = 32 * 1024
DRAIN_SECONDS = 2.0
REAP_PAUSE_MS, REAP_ROUNDS = 5, 1000
"""Pause between two looks for killed orphans, and the number of looks: 5 s and more in all."""
RNDADDENTROPY = 0x40085203  # uapi/linux/random.h, as RNDRESEEDCRNG
RNDRESEEDCRNG = 0x5207
MAY_BE_HIDDEN = ("/root", "/home")
"""The lab's own directories that a share may hide."""


class Gone:
    """Ignore that a process has already ended. Importing contextlib would add 0.1 s to the boot."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is ProcessLookupError


class Port:
    """The virtio-serial port: whole frames in both directions."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._unpacker = frames.Unpacker()
        self.arrived: list[tuple[int, bytes]] = []

    def send(self, kind: int, payload: bytes = b"") -> None:
        data = memoryview(frames.pack(kind, payload))
        while data:
            data = data[os.write(self.fd, data) :]

    def receive(self) -> None:
        """Wait for bytes and add the frames that they complete to ``arrived``. The lab ends with the stream."""
        data = os.read(self.fd, CHUNK)
        if not data:
            power_off()
        self.arrived += self._unpacker.feed(data)

    def next(self) -> tuple[int, bytes]:
        """Wait for the next frame."""
        while not self.arrived:
            self.receive()
        return self.arrived.pop(0)


def power_off() -> None:
    os.execv("/bin/busybox", ["poweroff", "-f"])


def find_port() -> str:
    base = "/sys/class/virtio-ports"
    for name in os.listdir(base):
        with open(f"{base}/{name}/name") as file:
            if file.read().strip() == frames.PORT_NAME:
                return f"/dev/{name}"
    raise SystemExit(f"no virtio port is named {frames.PORT_NAME}")


def call(*argv: str) -> str:
    """Run a small program. Return its error output, or an empty string if it succeeded."""
    read_end, write_end = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, write_end, 1), (os.POSIX_SPAWN_DUP2, write_end, 2)]
    child = os.posix_spawn(argv[0], argv, os.environ, file_actions=actions)
    os.close(write_end)
    said = b""
    while data := os.read(read_end, CHUNK):
        said += data
    os.close(read_end)
    _, status = os.waitpid(child, 0)
    return "" if status == 0 else said.decode(errors="replace").strip() or f"{argv[1]} failed"


def mount(tag: str, target: str, options: str) -> str:
    """Mount a 9p share. Refuse to hide a directory that the lab itself needs. Return why it failed, or nothing."""
    try:
        os.makedirs(target, exist_ok=True)
        inside_a_share = os.stat(target).st_dev != os.stat("/").st_dev
        if not inside_a_share and target not in MAY_BE_HIDDEN and os.listdir(target):
            return f"{target} is the lab's own directory"
    except OSError as error:
        return f"{target}: {error.strerror}"
    return call("/bin/busybox", "mount", "-t", "9p", "-o", options, tag, target)


def renew(payload: bytes) -> str:
    """Set the clock and add fresh randomness, because a restored lab has the saved ones."""
    import time
    from struct import pack

    random = payload[8:]
    try:
        time.clock_settime_ns(time.CLOCK_REALTIME, int.from_bytes(payload[:8], "little"))
        with open("/dev/urandom", "wb") as file:
            ioctl(file.fileno(), RNDADDENTROPY, pack("ii", 8 * len(random), len(random)) + random)
            ioctl(file.fileno(), RNDRESEEDCRNG)
    except OSError as error:
        return f"the lab's clock and randomness: {error.strerror}"
    return ""


def ioctl(fd: int, request: int, argument: bytes = b"") -> None:
    """Call ioctl(2) with an ``argument`` that the kernel only reads. Raises OSError.

    pyvmm's own binding is in the working tree, which a fork imports, and not this process.
    """
    import ctypes  # PREPARE has imported it; a plain boot does not need it

    if ctypes.CDLL(None, use_errno=True).ioctl(fd, ctypes.c_ulong(request), argument) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def set_size(fd: int, rows: int, columns: int) -> None:
    import termios  # only terminals need it

    termios.tcsetwinsize(fd, (rows, columns))


class Command:
    """One running command: its process group, and our ends of its streams."""

    def __init__(self, fields: list[bytes]) -> None:
        flags, rows, columns, count, cwd = fields[:5]
        argv = fields[5 : 5 + int(count)]
        env = dict(field.split(b"=", 1) for field in fields[5 + int(count) :])
        self.is_tty = frames.TTY in flags
        self.is_module = frames.MODULE in flags
        self.pending = bytearray()  # input that the command has not taken yet
        self.input_ended = False
        if self.is_tty:
            ours, theirs = os.openpty()
            set_size(ours, int(rows), int(columns))
            ends = (theirs, theirs, theirs)
            self.input: int | None = ours
            self.outputs = {ours: frames.OUTPUT}
        else:
            stdin, stdout, stderr = os.pipe(), os.pipe(), os.pipe()
            ends = (stdin[0], stdout[1], stderr[1])
            self.input = stdin[1]
            self.outputs = {stdout[0]: frames.OUTPUT, stderr[0]: frames.ERRORS}
        os.set_blocking(self.input, False)
        self.pid = os.fork()
        if self.pid == 0:
            self._become(ends, argv, env, cwd)
        for end in set(ends):
            os.close(end)
        self.pidfd = os.pidfd_open(self.pid)

    def _become(self, ends: tuple[int, int, int], argv: list[bytes], env: dict[bytes, bytes], cwd: bytes) -> None:
        """Turn the fork into the command. Never returns."""
        status: int | None = 127
        try:
            os.setsid()
            for number, end in enumerate(ends):
                os.dup2(end, number)
            if self.is_tty:
                os.close(os.open(os.ttyname(0), os.O_RDWR))  # the first terminal opened is the controlling one
            os.chdir(cwd)
            if self.is_module:
                if warm.is_ready(env):
                    raise warm.Become(argv, env)
                argv = [b"python3", b"-P", b"-m", *argv]
            for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.execvpe(argv[0], argv, env)
        except OSError as error:
            what = os.fsdecode(cwd if error.filename == cwd else argv[0])
            os.write(2, f"{what}: {error.strerror}\n".encode())
            status = 127 if error.errno in (errno.ENOENT, errno.ENOTDIR) else 126
        except warm.Become:
            status = None  # this process lives on
            raise
        finally:
            if status is not None:
                os._exit(status)

    def signal(self, number: int) -> None:
        with Gone():
            os.killpg(self.pid, number)

    def feed(self) -> int:
        """Pass input to the command without blocking. Return how many bytes it took or this dropped."""
        taken = 0
        while self.pending and self.input is not None:
            try:
                count = os.write(self.input, self.pending[:CHUNK])
            except BlockingIOError:
                return taken
            except OSError:  # the command has closed its stdin, or has ended
                self.close_input()
                break
            taken += count
            del self.pending[:count]
        if self.input is None:
            taken += len(self.pending)
            self.pending.clear()
        elif self.input_ended and not self.is_tty:
            self.close_input()
        return taken

    def close_input(self) -> None:
        if self.input is not None and not self.is_tty:
            os.close(self.input)
        self.input = None

    def hang_up(self, kind: int) -> None:
        for fd in [fd for fd, mine in self.outputs.items() if mine == kind and not self.is_tty]:
            os.close(fd)
            del self.outputs[fd]


def forward(port: Port, command: Command, fd: int) -> bool:
    """Forward the command's output. Return False at the end of that stream."""
    try:
        data = os.read(fd, CHUNK)
    except OSError:  # a terminal without a user
        data = b""
    if data:
        port.send(command.outputs[fd], data)
        return True
    os.close(fd)
    del command.outputs[fd]
    if fd == command.input:  # a terminal has one descriptor for both directions
        command.input = None
    return False


def run(port: Port, fields: list[bytes]) -> None:
    """Run one command to its end. Kill every process that it leaves behind."""
    command = Command(fields)
    ended = False
    while not ended:
        while port.arrived:
            obey(command, *port.next())
        if taken := command.feed():
            port.send(frames.CREDIT, taken.to_bytes(4, "little"))
        poll = select.poll()
        poll.register(port.fd, select.POLLIN)
        poll.register(command.pidfd, select.POLLIN)
        for fd in command.outputs:
            poll.register(fd, select.POLLIN)
        if command.pending and command.input is not None:
            wanted = select.POLLOUT | (select.POLLIN if command.is_tty else 0)
            poll.register(command.input, wanted)
        for fd, _ in poll.poll():
            if fd == port.fd:
                port.receive()
            elif fd == command.pidfd:
                ended = True
            elif fd in command.outputs:
                forward(port, command, fd)
    with Gone():
        os.kill(-1, signal.SIGKILL)  # from PID 1, this reaches every other process
    _, status = os.waitpid(command.pid, 0)
    os.close(command.pidfd)
    poll = select.poll()
    for fd in command.outputs:
        poll.register(fd, select.POLLIN)
    while command.outputs and (ready := poll.poll(DRAIN_SECONDS * 1000)):
        for fd, _ in ready:
            if not forward(port, command, fd):
                poll.unregister(fd)
    for fd in command.outputs:
        os.close(fd)
    command.close_input()
    reap()
    os.sync()  # its data may still be in the cache of a 9p mount, and this machine ends without notice
    code = os.waitstatus_to_exitcode(status)
    port.send(frames.EXIT, bytes([code if code >= 0 else 128 - code]))


def reap() -> None:
    """Wait for the killed orphans, which are children of PID 1, to be gone; not for those that the kernel holds up."""
    rounds = 0
    try:
        while rounds < REAP_ROUNDS:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                rounds += 1
                select.poll().poll(REAP_PAUSE_MS)
    except ChildProcessError:
        pass


def obey(command: Command, kind: int, payload: bytes) -> None:
    """Carry out the workstation's request for a running command."""
    if kind == frames.INPUT:
        command.pending += payload
        command.input_ended = command.input_ended or not payload
    elif kind == frames.SIGNAL:
        command.signal(payload[0])
    elif kind == frames.RESIZE and command.is_tty and command.input is not None:
        rows, columns = payload.split(b"\0")
        set_size(command.input, int(rows), int(columns))
    elif kind == frames.HANGUP:
        command.hang_up(frames.OUTPUT if payload[0] == 1 else frames.ERRORS)


def main() -> None:
    """Serve the workstation. In the fork that becomes a Python program, run that program."""
    try:
        serve(Port(find_port()))
    except warm.Become as become:
        program = become.with_traceback(None)
    program.run()


def serve(port: Port) -> NoReturn:
    """Carry out the workstation's requests until it disconnects."""
    port.send(frames.READY)
    while True:
        kind, payload = port.next()
        if kind == frames.MOUNT:
            tag, target, options = map(os.fsdecode, payload.split(b"\0"))
            port.send(frames.DONE, mount(tag, target, options).encode())
        elif kind == frames.BIND:
            source, target = map(os.fsdecode, payload.split(b"\0"))
            port.send(frames.DONE, call("/bin/busybox", "mount", "-o", "bind", source, target).encode())
        elif kind == frames.PREPARE:
            warm.prepare()
            port.send(frames.DONE)
        elif kind == frames.BYTECODE:
            warm.pieces.append(payload)
            port.send(frames.DONE)
        elif kind == frames.RENEW:
            port.send(frames.DONE, renew(payload).encode())
        elif kind == frames.EXEC:
            run(port, payload.split(b"\0"))
        # Any other request was for a command that has ended meanwhile.


if __name__ == "__main__":
    main()
