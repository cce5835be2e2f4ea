#!/usr/bin/env python3
"""What it costs that ranks talk: starting, agreeing, reporting, publishing and failing together, without weights.

    python tests/benchmarks/control_plane.py [--ranks 256] [--report-bytes 20000]

All ranks are processes of this machine and take the steps that an export takes: rank 0 gathers hosts, broadcasts the
agreement, everyone passes the two barriers, reports are gathered, a folder is published under a lease. Then the same
again with a rank that raises, is killed, or stalls halfway. Seconds are rank 0's; descriptors are those that the
launching process and rank 0 have open when all ranks are connected.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dist_export.runtime import publication
from dist_export.runtime.group import Group
from dist_export.runtime.launch import run_local


def steps_of_an_export(group: Group, output: Path, *, report_bytes: int, started: float) -> dict[str, float]:
    """Every exchange of an export; returns seconds per step and open descriptors, as rank 0 sees them."""
    seconds: dict[str, float] = {}

    def done(step: str) -> None:
        nonlocal started
        now = time.monotonic()
        seconds[step], started = now - started, now

    group.gather("hosts", b"node")
    done("start (fork, connect, first gather)")
    staging = publication.Staging(output) if group.rank == 0 else None
    digests = json.dumps({"digests": ["0" * 64] * group.world_size}).encode()
    group.broadcast("agreement", digests if group.rank == 0 else None)
    done("agree (lease, broadcast)")
    (publication.staging_folder(output) / f"rank{group.rank}.safetensors").write_bytes(b"")
    group.barrier("files created")
    done("barrier")
    group.barrier("files written")
    done("barrier again")
    reports = group.gather("reports", bytes(report_bytes))
    done("gather reports")
    if staging is not None:
        assert reports is not None and len(reports) == group.world_size
        publication.write_file(staging.finish() / publication.CONFIG, b"{}\n")
        staging.publish()
    group.barrier("published")
    done("publish")
    seconds["open descriptors of the launcher"] = len(os.listdir(f"/proc/{os.getppid()}/fd"))
    seconds["open descriptors of rank 0"] = len(os.listdir("/proc/self/fd"))
    return seconds


def measure_export(num_ranks: int, report_bytes: int) -> dict[str, float]:
    """One undisturbed run."""
    with tempfile.TemporaryDirectory() as folder:
        result, output, begun = Path(folder, "result.json"), Path(folder, "out"), time.monotonic()

        def main(group: Group) -> int:
            seconds = steps_of_an_export(group, output, report_bytes=report_bytes, started=begun)
            if group.rank == 0:
                result.write_text(json.dumps(seconds))
            return 0

        code = run_local(num_ranks, main)
        assert code == 0, code
        assert len(list(output.iterdir())) == num_ranks + 1
        whole = time.monotonic() - begun
        return {**json.loads(result.read_text()), "whole run": whole}


def measure_abort(num_ranks: int, how: str) -> dict[str, float]:
    """A rank in the middle fails while all others wait; seconds until every process is gone."""
    with tempfile.TemporaryDirectory() as folder:
        moment = Path(folder, "moment")

        def main(group: Group) -> int:
            group.barrier("started")
            if group.rank == num_ranks // 2:
                moment.write_text(str(time.monotonic()))
                if how == "raises":
                    raise ValueError("on purpose")
                os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            group.barrier("never")
            return 0

        with contextlib.redirect_stderr(io.StringIO()) as printed:
            code = run_local(num_ranks, main)
        ended = time.monotonic()
        causes = [line for line in printed.getvalue().splitlines() if line.startswith("dist-export: ")]
        assert code != 0 and len(causes) == 1, (code, causes)
        return {f"abort: a rank {how}": ended - float(moment.read_text())}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=256)
    parser.add_argument("--report-bytes", type=int, default=20_000, help="per rank")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = measure_export(options.ranks, options.report_bytes)
    for how in ("raises", "killed", "stalls"):
        results |= measure_abort(options.ranks, how)
    results["limit of open descriptors"] = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if options.json:
        print(json.dumps(results))
        return 0
    print(f"{options.ranks} ranks on {os.cpu_count()} cores")
    for name, value in results.items():
        print(f"  {name:40s}" + (f"{value:8.0f}" if "descriptors" in name else f"{value:8.2f} s"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
