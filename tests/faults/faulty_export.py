"""The exporter with one fault in it: `faulty_export.py local FAULT ARGUMENTS…` is ``dist-export export`` with it,
`… launched FAULT ARGUMENTS…` is launch/export.py with it.

FAULT is JSON: {"rank": 1, "point": "transfer", "after": 20, "action": "kill", "pace": 0.01}. Steps of the export are
wrapped, none is replaced: just before or after one of them the chosen rank dies, stops, raises or waits. `pace` makes
every write of every rank take that many seconds, so that there is time within the transfer.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dist_export import launcher, session
from dist_export.cli import build_parser
from dist_export.convert.execute import Executor
from dist_export.convert.outputs import OutputFile
from dist_export.errors import ExportError
from dist_export.runtime import exit_codes, publication
from dist_export.staged_files import StagedFiles

FAULT: dict[str, Any] = {}
HERE: dict[str, int] = {}
"""The rank of this process, once it is known, and how often the fault's point was passed."""


def wrap(owner: Any, name: str, *, before: Callable[..., None] | None = None, after: Any = None) -> None:
    """Call `before` and `after` with the arguments of ``owner.name`` around it."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        if before is not None:
            before(*arguments)
        result = original(*arguments, **named)
        if after is not None:
            after(*arguments)
        return result

    setattr(owner, name, wrapper)


def at(point: str) -> Callable[..., None]:
    """What happens at a point: nothing, or the fault."""

    def here(*_arguments: Any) -> None:
        if point == FAULT.get("point") and HERE.get("rank") == FAULT.get("rank"):
            HERE["passed"] = HERE.get("passed", 0) + 1
            if HERE["passed"] > FAULT.get("after", 0):
                act(FAULT["action"])

    return here


def act(action: str) -> None:
    """The fault itself."""
    os.write(1, f"rank {HERE['rank']} at {FAULT['point']} process {os.getpid()} dies at {time.monotonic()}\n".encode())
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "raise":
        raise KeyError("a bug in this rank")
    elif action == "refuse":
        raise ExportError("something is wrong with the input")
    elif action == "fill disk":
        fill_disk(Path(FAULT["file"]))
    else:
        time.sleep(float(action))


def fill_disk(path: Path) -> None:
    """Write until nothing more fits."""
    with path.open("wb", buffering=0) as file:
        size = 1 << 16
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


def pace(*_arguments: Any) -> None:
    """Makes a write slow, and says when rank 0 is amid its work."""
    with LOCK:
        HERE["writes"] = HERE.get("writes", 0) + 1
    if HERE["writes"] == 5 and HERE.get("rank") == 0:
        os.write(1, b"writing\n")
    time.sleep(FAULT.get("pace", 0.0))


def say_writes(*_arguments: Any) -> None:
    """How often this rank has written."""
    os.write(1, f"rank {HERE['rank']} wrote {HERE.get('writes', 0)} times\n".encode())


LOCK = threading.Lock()


def named(*names: str) -> Callable[..., None]:
    """At the points of these files only."""
    points = {name: at(point) for name, point in zip(names[::2], names[1::2], strict=True)}

    def here(path: Path, *_arguments: Any) -> None:
        points.get(path.name, at(""))()

    return here


def install() -> None:
    """Wrap the steps."""
    wrap(session.ExportSession, "run", before=lambda each: HERE.update(rank=each.group.rank))
    wrap(session.ExportSession, "_agree", before=at("agreement"), after=at("agreed"))
    wrap(StagedFiles, "create", before=at("before files"), after=at("files created"))
    wrap(StagedFiles, "_gather_run", before=at("gather"))
    wrap(OutputFile, "write_at", before=pace)
    wrap(OutputFile, "write_at", after=at("transfer"))
    wrap(Executor, "run", after=at("written"))
    wrap(session.ExportSession, "_fill_report", after=at("report"))
    wrap(session.ExportSession, "_finish", before=at("finish"))
    wrap(publication.Staging, "finish", after=at("moved"))
    manifest, config = publication.MANIFEST, publication.CONFIG
    wrap(publication, "write_file", before=named(manifest, "manifest", config, "config"))
    wrap(publication, "publish", before=at("publish"), after=at("published"))
    wrap(publication, "_replace", before=at("replace"))
    wrap(publication, "_move", after=at("inside"))
    wrap(session.ExportSession, "run", after=at("end"))
    if FAULT.get("count"):
        wrap(Executor, "run", after=say_writes)
    if FAULT.get("no exchange"):
        # What file systems without an atomic exchange (NFS, Lustre) answer.
        publication._exchange = lambda first, second: False
        rename = os.rename
        publication.os = Renamer(rename)  # type: ignore[attr-defined]


class Renamer:
    """`os`, with a point between the two renames of a replacement."""

    def __init__(self, rename: Callable[..., None]) -> None:
        self._rename = rename

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def rename(self, source: Path, target: Path) -> None:
        self._rename(source, target)
        if str(target).endswith(".replaced"):
            at("between renames")()


def main() -> int:
    """Run as the arguments say."""
    mode, fault, *arguments = sys.argv[1:]
    FAULT.update(json.loads(fault))
    install()
    if mode == "launched":
        return launcher.main(arguments)
    try:
        return launcher.export_locally(build_parser().parse_args(["export", *arguments]))
    except ExportError as error:  # as the command line does
        print(f"dist-export: error: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
