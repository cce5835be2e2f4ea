"""``python -m dist_export`` and the ``dist-export`` command."""

from __future__ import annotations

import atexit
import os
import sys

from dist_export.cli import main as run


def main() -> None:
    """The entry point: ends the process with the exit code of the command.

    Without taking the interpreter apart, of which nothing is left to write: that takes some 25 ms, with torch 200.
    """
    code = run()
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # closed by whoever started this
                stream.flush()
    except OSError:  # nobody reads what was printed
        code = code or 1
    os._exit(code)


if __name__ == "__main__":
    main()
