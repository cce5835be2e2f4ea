"""Arguments of ``dist-export refit``."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_export.arguments import parse_size, positive

DESCRIPTION = """Bring an existing export to a newer iteration of the same model. Every tensor is made as `export`
makes it, with the options that OUTPUT's manifest records, and compared with what OUTPUT holds:
only blocks that differ are written. Until all of them are on disk beside it, OUTPUT is untouched;
then they are put in place. A run that is stopped before that leaves OUTPUT as it was; one that is
stopped while it does that has taken config.json away, and the next refit finishes it. Refused, with
the reasons, where tensors or configuration are not the same: such a checkpoint is exported anew.
No server may read OUTPUT's files meanwhile."""

EPILOG = """examples:
  dist-export refit /checkpoints/run1 /exports/run1                 the latest iteration
  dist-export refit /checkpoints/run1 /exports/run1 --delta-dir D   what would change, as files to ship
  dist-export refit D /exports/run1                                 on another machine: apply them
  dist-export refit - /exports/run1                                 finish one that was stopped
  torchrun --nproc-per-node 8 -m dist_export refit /checkpoints/run1 /exports/run1
"""


def add_refit_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of a refit; the same whoever starts the processes."""
    parser.usage = "%(prog)s SOURCE OUTPUT [options]"
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=98)
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="Megatron --save folder (its latest iteration) or an iter_ folder; a delta; or -",
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the export to bring to it")
    source = parser.add_argument_group("where things are now (what was asked of them is in OUTPUT's manifest)")
    source.add_argument("--iteration", type=positive, metavar="N", help="this iteration instead of the latest")
    source.add_argument("--base", type=Path, metavar="DIR", help="the model that adapters were merged into")
    source.add_argument("--calibration", type=Path, metavar="FILE", help="scales of the newer iteration; needed where "
                        "the export was made with such a file")  # fmt: skip
    source.add_argument("--index-cache", type=Path, metavar="FILE", help="as of export")
    source.add_argument("--allow-mapping-code", action="store_true",
                        help="run the Python file that the export was made with")  # fmt: skip
    delta = parser.add_argument_group("what to make")
    delta.add_argument("--delta-dir", type=Path, metavar="DIR", help="leave OUTPUT as it is and create DIR with the "
                       "changed tensors, an index and the new configuration")  # fmt: skip
    delta.add_argument("--all-names", action="store_true", help="put unchanged tensors there too, for what wants every "
                       "name, such as a refit of TensorRT-LLM engines")  # fmt: skip
    delta.add_argument("--engines", type=Path, metavar="DIR", help="engines of this export: say how to refit them")
    run = parser.add_argument_group("running")
    run.add_argument("--num-processes", type=positive, metavar="N", help="default: target ranks, at most cores")
    run.add_argument("--host-memory", type=parse_size, metavar="SIZE", help="buffers per process, default 1g")
    run.add_argument("--num-threads", type=positive, metavar="N", help="per process, default 2; 1 if cores are few")
    run.add_argument("--device", default="auto", help="for arithmetic: auto (default), cpu, cuda, cuda:N")
    run.add_argument("--log-json", action="store_true", help="events as JSON lines on standard error, no text there")
    run.add_argument("--progress-file", type=Path, metavar="FILE", help="keep a JSON file with the state, each second")
