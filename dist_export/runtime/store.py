"""A small key-value store: the only way the ranks of a run talk to one another.

`MemoryStore` serves one process, `LocalStoreServer` and `LocalStore` the processes of one machine without torch;
`dist_export.runtime.torch_store` the processes of several. Nothing in a store waits: waiting is `Group`'s.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import struct
import tempfile
import threading
import time
from typing import Protocol

from dist_export.errors import ExportError
from dist_export.runtime.failure import StoreLostError

#: Longest value of one `set`, in bytes. torch's TCPStore takes at most 8 MiB; `Group` cuts longer values.
MAX_VALUE = 4 << 20

#: Longest message on the socket: a value, its key and the framing.
_MAX_MESSAGE = MAX_VALUE + (64 << 10)
#: Seconds without an answer after which the store counts as lost.
_ANSWER_WITHIN_S = 30.0
#: Clients that may have asked for a connection before the launcher answers.
_WAITING_CONNECTIONS = 1024
#: Seconds until another try where a connection could not be accepted.
_RETRY_S = 0.05
#: Shorter than the 108 bytes of sockaddr_un.sun_path.
_MAX_SOCKET_PATH = 100

_LENGTH = struct.Struct("<I")
_REQUEST = struct.Struct("<BH")  # operation, length of the key
_COUNT = struct.Struct("<q")

_SET, _SET_ONCE, _GET, _ADD, _DELETE = range(5)
_ABSENT, _PRESENT = b"\0", b"\1"


class Store(Protocol):
    """What every store does. All methods are safe to call from several threads of a process.

    `host_rank` is the rank whose process holds the data, which must therefore leave last, or None where the data
    outlive the ranks. Every method raises StoreLostError once the holder is gone.
    """

    @property
    def host_rank(self) -> int | None: ...

    def set(self, key: str, value: bytes) -> None:
        """Store `value` (at most `MAX_VALUE` bytes) under `key`."""

    def set_once(self, key: str, value: bytes) -> bytes:
        """Store `value` (non-empty UTF-8) unless the key exists; returns what is stored afterwards. Atomic."""

    def get(self, key: str) -> bytes | None:
        """The value, or None at once where there is none."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter (0 at first) and return its new value. Atomic. Counters are read by adding 0."""

    def delete(self, key: str) -> None:
        """Forget a key, existing or not."""

    def close(self) -> None:
        """Let go of connections; the data stay with their holder."""


class MemoryStore:
    """The data themselves, in this process."""

    host_rank: int | None = None

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._counters: dict[str, int] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: bytes) -> None:
        """Store `value` under `key`."""
        assert len(value) <= MAX_VALUE, (key, len(value))
        with self._lock:
            self._values[key] = value

    def set_once(self, key: str, value: bytes) -> bytes:
        """Store `value` unless the key exists; returns what is stored."""
        assert len(value) <= MAX_VALUE, (key, len(value))
        with self._lock:
            return self._values.setdefault(key, value)

    def get(self, key: str) -> bytes | None:
        """The value, or None."""
        with self._lock:
            return self._values.get(key)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter and return its new value."""
        with self._lock:
            self._counters[key] = self._counters.get(key, 0) + amount
            return self._counters[key]

    def delete(self, key: str) -> None:
        """Forget a key."""
        with self._lock:
            self._values.pop(key, None)

    def close(self) -> None:
        """Nothing to let go."""


class LocalStoreServer:
    """Serves a `MemoryStore` to processes of the same user on this machine.

    The socket lies in a fresh temporary directory with mode 0700. It listens from the start, so processes may be
    forked and connect before `start` runs the thread; a parent that forks must not have threads before.
    """

    def __init__(self) -> None:
        """Raises ExportError where no temporary directory can hold the socket."""
        self.memory = MemoryStore()
        self._folder = _private_folder()
        self.path = os.path.join(self._folder, "store")
        try:
            self._socket = _listening(self.path)
        except OSError as error:
            self.remove_folder()
            raise ExportError(f"cannot open a socket at {self.path}: {error}; set TMPDIR to a local folder") from error
        self._thread: threading.Thread | None = None
        self._end: tuple[int, int] = (-1, -1)
        """A pipe whose writing end is closed to end the thread."""

    def start(self) -> None:
        """Begin to answer, in a daemon thread. The process that made the server calls it, after forking."""
        self._end = os.pipe()
        thread = threading.Thread(target=self._accept, name="store", daemon=True)
        thread.start()
        self._thread = thread

    def connect_in_child(self) -> LocalStore:
        """The client of a forked child, which gives up its copy of the listening socket."""
        self._socket.close()
        return LocalStore(self.path)

    def close(self) -> None:
        """Stop answering and remove the socket and its directory. The process that made the server calls it."""
        if self._thread is not None:
            os.close(self._end[1])
            self._thread.join()
            os.close(self._end[0])
            self._thread = None
        self._socket.close()
        self.remove_folder()

    def _accept(self) -> None:
        """Serve every client in a thread of its own, until the pipe ends."""
        self._socket.setblocking(False)
        watched = select.poll()
        watched.register(self._socket, select.POLLIN)
        watched.register(self._end[0], select.POLLIN)
        while self._end[0] not in (descriptor for descriptor, _ in watched.poll()):
            try:
                connection, _ = self._socket.accept()
            except OSError:  # no descriptor or memory is free, and the client waits; or it has gone already
                time.sleep(_RETRY_S)
                continue
            connection.setblocking(True)
            try:
                threading.Thread(target=_serve, args=(connection, self.memory), name="client", daemon=True).start()
            except RuntimeError:  # no thread is to be had: this client learns of it, the others are served
                connection.close()

    def remove_folder(self) -> None:
        """Remove the socket and its directory; nobody can connect any more."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _listening(path: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(path)
        listening.listen(_WAITING_CONNECTIONS)
    except BaseException:
        listening.close()
        raise
    return listening


def _serve(connection: socket.socket, memory: MemoryStore) -> None:
    """Answer one client until it goes away or sends what no client of ours sends."""
    with connection, contextlib.suppress(OSError, ValueError, EOFError, struct.error):
        while True:
            _send(connection, _answer(_receive(connection), memory))


def _answer(message: bytes, memory: MemoryStore) -> bytes:
    operation, key_length = _REQUEST.unpack_from(message)
    value_at = _REQUEST.size + key_length
    key, value = message[_REQUEST.size : value_at].decode("utf-8"), message[value_at:]
    if len(value) > MAX_VALUE:
        raise ValueError(f"a value of {len(value)} bytes exceeds {MAX_VALUE}")
    if operation == _GET:
        found = memory.get(key)
        return _ABSENT if found is None else _PRESENT + found
    if operation == _SET_ONCE:
        return _PRESENT + memory.set_once(key, value)
    if operation == _ADD:
        return _PRESENT + _COUNT.pack(memory.add(key, *_COUNT.unpack(value)))
    if operation == _SET:
        memory.set(key, value)
    elif operation == _DELETE:
        memory.delete(key)
    else:
        raise ValueError(f"unknown operation {operation}")
    return _PRESENT


class LocalStore:
    """A client of `LocalStoreServer`, with one connection shared by the process's threads.

    A request that an exception interrupts (a signal's, say) leaves the connection between two messages; it is then
    dropped, and the next request opens another.
    """

    host_rank: int | None = None

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def set(self, key: str, value: bytes) -> None:
        """Store `value` under `key`."""
        self._request(_SET, key, value)

    def set_once(self, key: str, value: bytes) -> bytes:
        """Store `value` unless the key exists; returns what is stored."""
        return self._request(_SET_ONCE, key, value)[1:]

    def get(self, key: str) -> bytes | None:
        """The value, or None."""
        answer = self._request(_GET, key)
        return None if answer == _ABSENT else answer[1:]

    def add(self, key: str, amount: int) -> int:
        """Add to a counter and return its new value."""
        return int(_COUNT.unpack(self._request(_ADD, key, _COUNT.pack(amount))[1:])[0])

    def delete(self, key: str) -> None:
        """Forget a key."""
        self._request(_DELETE, key)

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._drop()

    def _request(self, operation: int, key: str, value: bytes = b"") -> bytes:
        assert len(value) <= MAX_VALUE, (key, len(value))
        encoded = key.encode("utf-8")
        with self._lock:
            try:
                connection = self._connected()
                _send(connection, _REQUEST.pack(operation, len(encoded)) + encoded + value)
                return _receive(connection)
            except (OSError, EOFError) as error:
                self._drop()
                raise StoreLostError(self.host_rank, str(error) or type(error).__name__) from error
            except BaseException:
                self._drop()
                raise

    def _connected(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(_ANSWER_WITHIN_S)
            self._socket.connect(self._path)
        return self._socket

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _private_folder() -> str:
    """A new folder that only this user can enter (mkdtemp: mode 0700) with a path short enough for a socket."""
    parents = [tempfile.gettempdir()] if len(tempfile.gettempdir()) < _MAX_SOCKET_PATH - 40 else ["/tmp", "/dev/shm"]
    for parent in parents:
        with contextlib.suppress(OSError):
            return tempfile.mkdtemp(prefix="dist-export-", dir=parent)
    raise ExportError(f"cannot create a folder in {' or '.join(parents)}: set TMPDIR to a writable local folder")


def _send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(message)) + message)


def _receive(connection: socket.socket) -> bytes:
    """One message. Raises EOFError at the end of the connection, ValueError for a longer message than we send."""
    length = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size))[0]
    if length > _MAX_MESSAGE:
        raise ValueError(f"a message of {length} bytes exceeds {_MAX_MESSAGE}")
    return _receive_exactly(connection, length)


def _receive_exactly(connection: socket.socket, length: int) -> bytes:
    buffer = bytearray(length)
    view = memoryview(buffer)
    received = 0
    while received < length:
        count = connection.recv_into(view[received:])
        if count == 0:
            raise EOFError("the connection was closed")
        received += count
    return bytes(buffer)
