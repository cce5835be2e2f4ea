"""The exporter, killed: ``killed_refit.py POINT ARGUMENTS…`` is ``dist-export ARGUMENTS…``, and the first process that
comes to POINT kills itself there. Steps of the refit are wrapped, none is replaced."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dist_export import cli
from dist_export.refit import redo
from dist_export.refit.blocks import BlockLog
from dist_export.refit.files import ComparedFiles


def killed_after(function: Callable[..., Any], times: int) -> Callable[..., Any]:
    """`function`, whose process is killed when it has done it that many times."""
    left = [times]

    def wrapper(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapper


POINTS: dict[str, tuple[object, str, int]] = {
    "logging": (BlockLog, "append", 2),
    "logged": (ComparedFiles, "finish", 1),
    "prepared": (redo.publication, "write_file", 4),
    "committed": (redo, "commit", 1),
    "withheld": (redo.Redo, "withhold_configurations", 1),
    "a block": (redo, "write_all", 1),
    "blocks": (redo.Redo, "write_blocks", 1),
    "a document": (redo.os, "replace", 1),
    "documents": (redo.Redo, "place_documents", 1),
}
"""Point -> (owner, what it does, how often)."""


if __name__ == "__main__":
    owner, name, times = POINTS[sys.argv[1]]
    setattr(owner, name, killed_after(getattr(owner, name), times))
    sys.exit(cli.main(sys.argv[2:]))
