"""What iterating costs a rank in memory: buckets and what moves for them, whatever the size of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("megatron.core")

from support.exports import REPOSITORY

BUCKET_BYTES = 4 << 20
BUFFERS = 24 << 20
"""Of the threads, of gloo, and of the allocator."""


def test_the_peak_follows_the_bucket_not_the_model() -> None:
    """A bucket, what was received for it and what was sent: measured as resident size of two gloo ranks with tp 2."""
    process = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests" / "support" / "live_peak.py"), str(BUCKET_BYTES)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    ranks = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["total"] > 100 << 20
        assert rank["largest"] <= BUCKET_BYTES
        assert rank["grown"] < 3 * BUCKET_BYTES + BUFFERS, rank
