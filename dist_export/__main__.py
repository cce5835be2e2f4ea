"""``python -m dist_export`` and the ``dist-export`` command."""

from __future__ import annotations

import sys

from dist_export.cli import main as run


def main() -> int:
    """The entry point: exit code of the command."""
    return run()


if __name__ == "__main__":
    sys.exit(main())
