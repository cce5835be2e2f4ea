"""The process that builds one rank's engine: ``python -m dist_export.engines.worker``, its order as JSON on stdin."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dist_export.engines.options import EngineOptions
from dist_export.errors import ExportError
from dist_export.runtime import exit_codes
from dist_export.runtime.signals import die_with_parent


def main() -> int:
    """Build, and say on the last line of standard error why it did not work. Returns the exit code."""
    order = json.loads(sys.stdin.read())
    die_with_parent(order["parent"])
    from dist_export.engines.adapter import build_rank

    options = EngineOptions.of(order["options"])
    try:
        build_rank(Path(order["folder"]), order["rank"], options, Path(order["output"]))
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    return exit_codes.OK


if __name__ == "__main__":
    sys.exit(main())
