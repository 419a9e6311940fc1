"""A port on this machine that leads to JAX's coordination service in process 0.

JAX's client ends its process with pages of text in the very moment in which the service's
connection breaks. Behind a tunnel it sees silence instead. So the line that says which process is
lost comes first (peers.py).
"""

import contextlib
import socket
import threading

from moe_jax.base.errors import UserError
from moe_jax.parallel.processes.wire import connect, listen

CHUNK = 1 << 16


def open_tunnel(address: str, patience: float) -> int:
    """The local port. Connections to it lead to `address`, which may take `patience` seconds."""
    server = listen(0, "127.0.0.1")
    threading.Thread(target=_accept, args=(server, address, patience), daemon=True).start()
    return server.getsockname()[1]


def _accept(server: socket.socket, address: str, patience: float) -> None:
    while True:
        near, _ = server.accept()
        threading.Thread(target=_serve, args=(near, address, patience), daemon=True).start()


def _serve(near: socket.socket, address: str, patience: float) -> None:
    try:
        far = connect(address, patience)
    except UserError:
        near.close()
        return
    far.settimeout(None)
    for connection in (near, far):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=_pump, args=(near, far), daemon=True).start()
    _pump(far, near)
    # `near` stays open: that is what the tunnel is for.


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Copies bytes until one of the two ends."""
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            target.sendall(data)
