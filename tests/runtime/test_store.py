"""The stores: one behaviour for the one in memory, the one over a socket, and torch's."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import stat
import struct
import threading
from collections.abc import Iterator

import pytest

from dist_export.errors import ExportError
from dist_export.runtime.failure import StoreLostError
from dist_export.runtime.store import MAX_VALUE, LocalStore, LocalStoreServer, MemoryStore, Store
from dist_export.runtime.torch_store import connect_torch_store
from dist_export.runtime.world import World


@pytest.fixture
def server() -> Iterator[LocalStoreServer]:
    """A server that answers."""
    server = LocalStoreServer()
    server.start()
    yield server
    server.close()


@pytest.fixture(params=["memory", "local", "torch"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """Every kind of store, empty."""
    kind = request.param
    if kind == "memory":
        yield MemoryStore()
        return
    if kind == "local":
        local_store = LocalStore(request.getfixturevalue("server").path)
        with contextlib.closing(local_store):
            yield local_store
        return
    pytest.importorskip("torch")
    with contextlib.closing(connect_torch_store(_alone(), _free_address(), timeout_s=20)) as torch_store:
        yield torch_store


def test_values_come_back_and_absence_is_none_at_once(store: Store) -> None:
    assert store.get("a/b") is None
    for value in (b"", b"\0\xff" * 5, b"\xff" * MAX_VALUE):
        store.set("a/b", value)
        assert store.get("a/b") == value
    store.delete("a/b")
    store.delete("never there")
    assert store.get("a/b") is None


def test_the_first_value_of_set_once_stays(store: Store) -> None:
    assert store.set_once("cause", b"first") == b"first"
    assert store.set_once("cause", b"second") == b"first"
    assert store.get("cause") == b"first"


def test_counters_add(store: Store) -> None:
    assert [store.add("n", amount) for amount in (0, 3, -1, 0)] == [0, 3, 2, 2]


def test_threads_share_a_client(store: Store) -> None:
    def work(name: str) -> None:
        for number in range(200):
            store.set(f"{name}", b"%d" % number)
            assert store.get(f"{name}") == b"%d" % number
            store.add("sum", 1)

    threads = [threading.Thread(target=work, args=(f"t{index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.add("sum", 0) == 800


def test_the_socket_is_private(server: LocalStoreServer) -> None:
    folder = os.path.dirname(server.path)
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    server.close()
    assert not os.path.exists(folder)


@pytest.mark.parametrize(
    "garbage",
    [
        struct.pack("<I", 1 << 31),  # a length that must not be allocated
        struct.pack("<I", 1) + b"x",  # too short for a request
        struct.pack("<IBH", 3, 99, 0),  # an unknown operation
        struct.pack("<IBHB", 4, 2, 1, 0xFF),  # a key that is no UTF-8
        struct.pack("<IBH", 3, 3, 0),  # an amount that is missing
    ],
)
def test_garbage_ends_its_connection_and_no_other(server: LocalStoreServer, garbage: bytes) -> None:
    with contextlib.closing(LocalStore(server.path)) as store:
        store.set("key", b"value")
        with socket.socket(socket.AF_UNIX) as other:
            other.settimeout(5)
            other.connect(server.path)
            other.sendall(garbage)
            assert other.recv(1) == b""
        assert store.get("key") == b"value"


def test_a_client_waits_while_descriptors_are_short(server: LocalStoreServer) -> None:
    """accept() fails then, and the launcher must neither spin nor give up."""
    request = struct.pack("<IBH", 4, 2, 1) + b"k"  # get "k"
    with socket.socket(socket.AF_UNIX) as early, socket.socket(socket.AF_UNIX) as late:
        free = os.dup(0)
        os.close(free)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            for client in (early, late):
                client.settimeout(0.3)
                client.connect(server.path)
                client.sendall(request)
            with pytest.raises(TimeoutError):  # of the two, an accept() that waits already has a descriptor for one
                late.recv(5)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for client in (early, late):
            client.settimeout(5)
            assert client.recv(5) == struct.pack("<I", 1) + b"\0"


def test_a_request_that_is_interrupted_does_not_confuse_the_next(server: LocalStoreServer) -> None:
    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with contextlib.closing(LocalStore(server.path)) as store:
            store.set("a", b"1")
            store.set("b", b"2")
            with server.memory._lock, pytest.raises(KeyboardInterrupt):  # the answer to come is held up
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                store.get("a")
            assert store.get("b") == b"2"
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_client_notices_that_the_server_is_gone(server: LocalStoreServer) -> None:
    store = LocalStore(server.path)
    server.close()
    with pytest.raises(StoreLostError, match="the launching process is gone"):
        store.get("key")


def test_a_long_temporary_folder_does_not_break_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere/" + "x" * 120)
    server = LocalStoreServer()
    server.close()
    assert len(server.path) < 108


def test_no_temporary_folder_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with pytest.raises(ExportError, match="set TMPDIR to a writable local folder"):
        LocalStoreServer()


def test_a_taken_port_is_an_error_that_names_the_address() -> None:
    pytest.importorskip("torch")
    environ = _free_address()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(environ["MASTER_PORT"])))
        taken.listen()
        with pytest.raises(ExportError, match=rf"hosting the store at 127.0.0.1:{environ['MASTER_PORT']} failed"):
            connect_torch_store(_alone(), environ, timeout_s=5)


def _alone() -> World:
    return World(0, 2, 0, 2, 0, "slurm")


def _free_address() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
