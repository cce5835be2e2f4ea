"""Why a run failed, as a value that crosses processes."""

from __future__ import annotations

import json
import signal
import traceback
from typing import Literal, get_args

from msgspec import Struct, to_builtins

from dist_export.errors import ExportError
from dist_export.runtime import exit_codes

#: ``input``: an ExportError; ``internal``: anything unexpected; ``lost``: a rank was killed, stopped responding or
#: ended early; ``interrupted`` and ``terminated``: SIGINT and SIGTERM.
Kind = Literal["input", "internal", "lost", "interrupted", "terminated"]

#: Longest message kept, in characters: it must fit into one store value.
MAX_MESSAGE = 64 * 1024

_EXIT_CODES: dict[Kind, int] = {
    "input": exit_codes.BAD_INPUT,
    "internal": exit_codes.INTERNAL,
    "lost": exit_codes.PEER_FAILED,
    "interrupted": exit_codes.INTERRUPTED,
    "terminated": exit_codes.TERMINATED,
}


class TerminatedError(SystemExit):
    """SIGTERM or SIGINT arrived. No `Exception`, so that code which handles errors does not swallow it.

    Where nothing catches it, the interpreter exits with 128 + the signal's number and prints nothing.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(exit_codes.of_signal(signal_number))
        self.signal_number = signal_number
        self.exit_code = exit_codes.of_signal(signal_number)

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signal_number).name}"


class Failure(Struct, frozen=True):
    """The cause of a failed run: `rank` failed (-1: the launching process), `reporter` noticed and prints it."""

    rank: int
    kind: Kind
    message: str
    reporter: int

    def describe(self, *, with_rank: bool = True) -> str:
        """The text for the user; losses read "rank 3 was killed …", errors "rank 3: message"."""
        if self.rank < 0 or not with_rank:
            return self.message
        return f"rank {self.rank} {self.message}" if self.kind == "lost" else f"rank {self.rank}: {self.message}"

    @property
    def exit_code(self) -> int:
        """The exit code of a process that reports this failure as the run's."""
        return _EXIT_CODES[self.kind]

    def encode(self) -> bytes:
        """ASCII JSON of at most a few times `MAX_MESSAGE`; the middle of a longer message is left out."""
        return json.dumps(to_builtins(self) | {"message": _shortened(self.message)}).encode("ascii")

    @staticmethod
    def decode(data: bytes) -> Failure:
        """The inverse of `encode`. Raises ValueError where `data` is something else."""
        fields = json.loads(data)
        if not isinstance(fields, dict) or fields.get("kind") not in get_args(Kind):
            raise ValueError(f"not a failure record: {data[:80]!r}")
        return Failure(int(fields["rank"]), fields["kind"], str(fields["message"]), int(fields["reporter"]))

    @staticmethod
    def of(rank: int, error: BaseException) -> Failure:
        """The failure of `rank` by its own `error`: an ExportError's message, or the traceback of anything else."""
        if isinstance(error, TerminatedError):
            interrupted = error.signal_number == signal.SIGINT
            return Failure(rank, "interrupted" if interrupted else "terminated", str(error), rank)
        if isinstance(error, ExportError):
            return Failure(rank, "input", str(error), rank)
        return Failure(rank, "internal", "".join(traceback.format_exception(error)).rstrip(), rank)


class PeerFailedError(Exception):
    """Another rank failed, was killed or stopped responding; `failure` says which and why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.describe())
        self.failure = failure
        self.rank = failure.rank
        self.message = failure.message


class StoreLostError(PeerFailedError):
    """The process that hosts the key-value store is gone or does not answer."""

    def __init__(self, host_rank: int | None, detail: str) -> None:
        rank = -1 if host_rank is None else host_rank
        what = "the launching process is gone" if rank < 0 else "stopped responding (killed?)"
        super().__init__(Failure(rank, "lost", f"{what}: {detail}", reporter=rank))


def _shortened(message: str) -> str:
    if len(message) <= MAX_MESSAGE:
        return message
    half = MAX_MESSAGE // 2
    return f"{message[:half]}\n… {len(message) - 2 * half} characters left out …\n{message[-half:]}"


def is_resumable(error: BaseException) -> bool:
    """Whether what was written is worth keeping: the run was stopped, rather than its input being at fault."""
    if isinstance(error, PeerFailedError):
        return error.failure.kind != "input"
    return not isinstance(error, ExportError)
