"""Messages between two processes: JSON over a TCP connection, each after its length."""

import contextlib
import json
import socket
import struct
import threading
import time
from typing import Any

from moe_jax.base.errors import UserError

Message = dict[str, Any]

LARGEST = 1 << 28
"""Bytes of a message. A tokenizer is the largest part of one, with some millions."""
LENGTH = struct.Struct(">I")
RETRY_SECONDS = 0.2


class LostError(Exception):
    """The connection has ended, or was silent for too long. The message says which."""


class Wire:
    """One end of a connection. `send` may be called from several threads, `receive` from one."""

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        """`timeout`: seconds of silence after which `receive` gives up."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(timeout)
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """LostError: it cannot be sent."""
        data = json.dumps(message).encode()
        assert len(data) <= LARGEST
        try:
            with self._sending:
                self._connection.sendall(LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise LostError(_reason(error)) from error

    def receive(self) -> Message:
        """The next message. LostError: there is none, or it is none of ours."""
        (length,) = LENGTH.unpack(self._read(LENGTH.size))
        if length > LARGEST:
            raise LostError("it speaks another language")
        try:
            message = json.loads(self._read(length))
        except (ValueError, RecursionError):
            raise LostError("it speaks another language") from None
        if not isinstance(message, dict):
            raise LostError("it speaks another language")
        return message

    def close(self) -> None:
        """Ends the connection. The other end reads its end."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            try:
                part = self._connection.recv(min(length - len(parts), 1 << 16))
            except OSError as error:
                raise LostError(_reason(error)) from error
            if not part:
                raise LostError("its connection has ended")
            parts += part
        return bytes(parts)


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "it gave no sign of life"
    if isinstance(error, ConnectionError):
        return "its connection has ended"
    return error.strerror or "its connection has ended"


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of HOST:PORT, without the brackets of an IPv6 address."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def listen(port: int, host: str = "") -> socket.socket:
    """A socket that waits for connections, on all addresses unless `host` is one. OSError."""
    if host == "" and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server((host, port))


def connect(address: str, patience: float) -> socket.socket:
    """A connection to HOST:PORT, tried again until `patience` seconds are over. UserError."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return socket.create_connection(host_and_port(address), timeout=5.0)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process 0 does not answer at {address} ({error.strerror or error}): start "
                    "it, or correct processes.coordinator"
                ) from error
        time.sleep(RETRY_SECONDS)
