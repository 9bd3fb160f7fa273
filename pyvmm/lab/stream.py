# SPDX-License-Identifier: Apache-2.0
"""Forward one command's streams between the workstation and the lab's agent, and return its exit status.

Only ``Lab`` uses it, for one command. Owns the terminal's mode and the signal handlers, and restores both.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pyvmm.interrupt import ENDING, handling
from pyvmm.lab import frames
from pyvmm.terminal import in_background

Sink = Callable[[bytes], object]
"""Takes output as it arrives; a BrokenPipeError from it closes the command's stream."""

PATIENCE = 10.0
"""Seconds that a command has to end after a forwarded signal before its lab is ended."""

CHUNK = 32 * 1024


class ChannelClosedError(Exception):
    """The lab ended, or sent invalid frames."""


class InsistedError(Exception):
    """A forwarded signal (``number``) did not end the command in time, or the user sent it again."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Pump:
    """One command's use of the channel.

    ``stdin`` is the whole input, or a file descriptor read to its end. ``timeout`` is in seconds.
    """

    def __init__(
        self,
        channel: socket.socket,
        stdin: bytes | int,
        stdout: Sink,
        stderr: Sink,
        *,
        is_tty: bool = False,
        timeout: float | None = None,
    ) -> None:
        self._channel = channel
        self._unpacker = frames.Unpacker()
        self._input = memoryview(stdin) if isinstance(stdin, bytes) else memoryview(b"")
        self._stdin = stdin if isinstance(stdin, int) else None
        self._sinks: dict[int, Sink] = {frames.OUTPUT: stdout, frames.ERRORS: stderr}
        self._tty_fd = self._stdin if is_tty else None
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._window = frames.WINDOW
        self._input_ended = False
        self._outgoing = bytearray()
        self._signals = 0

    def run(self, command: bytes) -> int:
        """Send ``command``, an EXEC frame; return its exit status.

        Raises ChannelClosedError, InsistedError or TimeoutError. After any of them the channel is unusable.
        """
        self._outgoing += command
        with self._raw_terminal(), self._caught_signals() as caught, selectors.PollSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            selector.register(caught, selectors.EVENT_READ)
            while True:
                self._choose(selector)
                for key, events in selector.select(self._remaining()):
                    if key.fileobj is caught:
                        for number in caught.recv(64):
                            self._forward(number)
                    elif key.fileobj is not self._channel:
                        self._read_input()
                    elif events & selectors.EVENT_WRITE:
                        self._flush()
                    elif (status := self._receive()) is not None:
                        return status
                if self._remaining() == 0.0:
                    if self._signals:
                        raise InsistedError(self._signals)
                    raise TimeoutError

    def _remaining(self) -> float | None:
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def _choose(self, selector: selectors.BaseSelector) -> None:
        """Queue the input that the window allows, and watch the descriptors that can make progress."""
        if self._stdin is None:
            while self._window and not self._input_ended and len(self._outgoing) < CHUNK:
                self._queue_input(bytes(self._input[: min(CHUNK, self._window)]))
        else:
            wanted = self._window > 0 and not self._input_ended and len(self._outgoing) < CHUNK
            if wanted and self._stdin not in selector.get_map():
                selector.register(self._stdin, selectors.EVENT_READ)
            elif not wanted and self._stdin in selector.get_map():
                selector.unregister(self._stdin)
        # One or the other: the agent reads whenever it does not write, so writing first cannot deadlock.
        selector.modify(self._channel, selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0))

    def _read_input(self) -> None:
        if self._stdin is not None:
            try:
                self._queue_input(os.read(self._stdin, min(CHUNK, self._window)))
            except OSError:  # a terminal that hung up
                self._queue_input(b"")

    def _queue_input(self, data: bytes) -> None:
        self._outgoing += frames.pack(frames.INPUT, data)
        self._window -= len(data)
        self._input = self._input[len(data) :]
        self._input_ended = not data

    def _flush(self) -> None:
        try:
            sent = self._channel.send(self._outgoing, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelClosedError from error
        del self._outgoing[:sent]

    def _receive(self) -> int | None:
        try:
            data = self._channel.recv(128 * 1024)
        except OSError as error:
            raise ChannelClosedError from error
        if not data:
            raise ChannelClosedError
        try:
            arrived = self._unpacker.feed(data)
        except ValueError as error:
            raise ChannelClosedError from error
        for kind, payload in arrived:
            if kind == frames.EXIT:
                return payload[0]
            if kind == frames.CREDIT:
                self._window += int.from_bytes(payload, "little")
            elif kind in self._sinks:
                self._deliver(kind, payload)
        return None

    def _deliver(self, kind: int, payload: bytes) -> None:
        try:
            self._sinks[kind](payload)
        except BrokenPipeError:  # let the command notice, as it would here
            self._sinks[kind] = _discard
            self._outgoing += frames.pack(frames.HANGUP, b"\1" if kind == frames.OUTPUT else b"\2")

    def _forward(self, number: int) -> None:
        if number == signal.SIGWINCH:
            if self._tty_fd is not None:
                rows, columns = termios.tcgetwinsize(self._tty_fd)
                self._outgoing += frames.pack_fields(frames.RESIZE, b"%d" % rows, b"%d" % columns)
            return
        self._outgoing += frames.pack(frames.SIGNAL, bytes([number]))
        patience = time.monotonic() + PATIENCE
        self._deadline = patience if self._deadline is None else min(self._deadline, patience)

    @contextmanager
    def _caught_signals(self) -> Iterator[socket.socket]:
        """Turn signals for the command into bytes on a socket. Works only in the main thread."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        with ours, theirs:
            if threading.current_thread() is not threading.main_thread():
                yield ours
                return
            old_fd = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
            numbers = (*ENDING, signal.SIGWINCH) if self._tty_fd is not None else ENDING
            try:
                with handling(self._on_signal, numbers):
                    yield ours
            finally:
                signal.set_wakeup_fd(old_fd)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Count the signal. The byte on the socket does the rest, unless the process is blocked in an unread sink."""
        if number == signal.SIGWINCH:
            return
        if self._signals:
            raise InsistedError(number)
        self._signals = number

    @contextmanager
    def _raw_terminal(self) -> Iterator[None]:
        """Pass keys to the lab's terminal unchanged. ^C becomes a byte, which the lab interprets."""
        if self._tty_fd is None:
            yield
            return
        old = termios.tcgetattr(self._tty_fd)
        try:
            tty.setraw(self._tty_fd)
            yield
        finally:
            if not in_background(self._tty_fd):
                termios.tcsetattr(self._tty_fd, termios.TCSADRAIN, old)


def _discard(_data: bytes) -> None:
    """Drop output without a reader."""
