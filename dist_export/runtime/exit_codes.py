"""Exit codes of every command and of every rank.

    0    everything done
    1    an internal error (a bug); the traceback of the rank that met it is printed
    2    bad usage or bad input: the message says what to change
    3    another rank failed, was killed or stopped responding; on the launching process: a rank was lost
    4    `verify` found the export wrong; `evaluate` found it worse than a threshold allows
    130  interrupted (SIGINT), 143 terminated (SIGTERM): 128 + the signal's number
"""

from __future__ import annotations

OK = 0
INTERNAL = 1
BAD_INPUT = 2
PEER_FAILED = 3
NOT_VERIFIED = 4
INTERRUPTED = 130
TERMINATED = 143


def of_signal(signal_number: int) -> int:
    """The exit code of a process that stopped because of a signal, as shells count."""
    return 128 + signal_number
