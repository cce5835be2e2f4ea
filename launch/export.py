#!/usr/bin/env python3
"""Export a Megatron checkpoint as a distributed job.

torchrun --nproc-per-node 8 launch/export.py CHECKPOINT OUTPUT --tp 4 --pp 2
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dist_export.launcher import main

if __name__ == "__main__":
    sys.exit(main())
