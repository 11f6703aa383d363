"""The QMP socket of somebody else: a connection waits for it, and says so when it has waited enough."""

import contextlib
import json
import socket
import threading
import time
from pathlib import Path

import pytest

from snapshot.errors import SocketTaken
from snapshot.qmp import Qmp, listening

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}


def full(server: socket.socket, path: str) -> list[socket.socket]:
    """Clients that wait, as many as the backlog takes: the next connect is told to try again."""
    server.bind(path)
    server.listen(0)
    waiting = []
    while True:
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        waiting.append(one)
        try:
            one.connect(path)
        except BlockingIOError:
            return waiting


def serve(server: socket.socket) -> None:
    """Accept again, one after the other, as QEMU does: those that have gone, then the one that asks."""
    served = False
    while not served:
        client, _ = server.accept()
        with client, contextlib.suppress(OSError):
            served = answer(client)


def answer(client: socket.socket) -> bool:
    """Greet, and answer every command; whether the last one was asked."""
    client.sendall(json.dumps(GREETING).encode() + b"\n")
    while command := client.recv(4096):  # they come one by one, without an end of line
        client.sendall(json.dumps({"return": {}, "id": json.loads(command).get("id")}).encode() + b"\n")
        if b"query-status" in command:
            return True
    return False


def test_more_clients_wait_than_the_socket_takes(tmp_path: Path) -> None:
    path = str(tmp_path / "q")
    with socket.socket(socket.AF_UNIX) as server:
        waiting = full(server, path)
        assert listening(path)
        started = time.monotonic()
        with pytest.raises(SocketTaken, match="another client"):
            Qmp(path, wait=0.5)
        assert 0.4 < time.monotonic() - started < 5
        for one in waiting:
            one.close()


def test_it_gets_its_turn(tmp_path: Path) -> None:
    path = str(tmp_path / "q")
    with socket.socket(socket.AF_UNIX) as server:
        waiting = full(server, path)

        def leave() -> None:
            time.sleep(0.5)
            for one in waiting:
                one.close()
            serve(server)

        thread = threading.Thread(target=leave, daemon=True)
        thread.start()
        qmp = Qmp(path, wait=10)
        assert qmp.version == (7, 2, 0)
        assert qmp.execute("query-status") == {}
        qmp.close()
        thread.join(10)
        assert not thread.is_alive()
