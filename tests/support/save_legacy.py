"""Save several real Megatron-Core models on CPU in one process, as legacy rank files and as torch_dist.

    python tests/support/save_legacy.py OUT '{"name": {"style": "llama", "tp": 2, "vpp": 2}, …}'

The options are those of launch/make_checkpoint.py; `formats` are the formats to save in, both without it. A model goes
to OUT/name/legacy and OUT/name/torch_dist. Ranks are forks of this process, so that the imports are paid once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))

import make_checkpoint

FORMATS = ("legacy", "torch_dist")


def command_line(folder: Path, given: dict[str, Any]) -> list[str]:
    """Options as make_checkpoint.py takes them."""
    line = [str(folder)]
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        line += [flag] if value is True else [flag, str(value)]
    return line


def main() -> None:
    """Fork the ranks of each model and format in turn."""
    out, models = Path(sys.argv[1]), json.loads(sys.argv[2])
    parser = make_checkpoint.build_parser()
    for name, given in models.items():
        for kind in given.pop("formats", FORMATS):
            options = parser.parse_args(command_line(out / name / kind, {**given, "format": kind}))
            make_checkpoint.resolve(options)
            make_checkpoint.start_processes(options)


if __name__ == "__main__":
    main()
