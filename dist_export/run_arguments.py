"""Arguments of the commands that run a model: calibrate, generate, evaluate."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_export.arguments import positive

SCHEMES = ("fp8", "int8_sq", "int4_awq", "nvfp4")
CALIBRATE = """Post-training quantisation with NVIDIA ModelOpt: runs texts through the checkpoint's model, which
Megatron-Core builds, and keeps what its quantisers saw in a small safetensors file for `dist-export export
--quantization SCHEME --calibration FILE`. Any checkpoint layout will do. A model that does not fit one process is held
by several: `torchrun --nproc-per-node 8 -m dist_export calibrate … --tp 4 --pp 2`, with --device cuda a GPU each.
Scales of the KV cache are not calibrated here: ModelOpt finds them in TransformerEngine's attention only, which needs a
GPU; give the export --kv-cache-scale, or a checkpoint that ModelOpt calibrated there."""


GENERATE = """Tokens that an export continues a prompt with, computed in float32 on the CPU: of a TensorRT-LLM folder by
a reference interpreter, of a Hugging Face folder by transformers; of a folder of engines by TensorRT-LLM on their GPU.
Quantised weights are decoded first; activations are not rounded. At temperature 0 the result is the same for every
target. To look at an export, not to serve it: the whole text is run again for every token."""
EVALUATE = """Perplexity on texts, and ROUGE of the export's summaries where the data has summaries, beside the same
numbers of the checkpoint's own model in Megatron-Core (--checkpoint). Computed in float32 on the CPU, as `generate`
does. Exit code 4 when a threshold is missed."""


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of a calibration."""
    parser.description = CALIBRATE
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="Megatron checkpoint of any kind")
    parser.add_argument("calibration_file", type=Path, metavar="FILE.safetensors", help="file to write")
    parser.add_argument("--scheme", choices=SCHEMES, default="fp8", help="default: fp8")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE",
                        help="texts: .jsonl with text (or article) or tokens, a datasets folder, or lines of token "
                             "ids; cnn_dailymail is the usual choice")  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of a Hugging Face tokenizer, for texts")
    parser.add_argument("--text-field", metavar="NAME", help="field of the text, default text, article, …")
    parser.add_argument("--num-samples", type=positive, default=512, metavar="N", help="default 512")
    parser.add_argument("--sequence-length", type=positive, default=512, metavar="N", help="of a text, default 512")
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="texts of one length at a time")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    layout = parser.add_argument_group("layout of the model under torchrun, srun or mpirun",
                                       "tp x pp processes; default: the checkpoint's own, else what fits")  # fmt: skip
    layout.add_argument("--tp", type=positive, metavar="N", help="tensor-parallel size")
    layout.add_argument("--pp", type=positive, metavar="N", help="pipeline-parallel size")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    _add_model_arguments(parser)


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of a generation."""
    parser.description = GENERATE
    parser.add_argument("output", type=Path, metavar="OUTPUT",
                        help="a finished export, TensorRT-LLM or Hugging Face, or a folder of engines")  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", metavar="TEXT", help="a text to go on with; repeatable")
    what.add_argument("--tokens", action="append", metavar="IDS", help="token ids with commas or spaces; repeatable")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of the tokenizer, default the export's")
    parser.add_argument("--max-new-tokens", type=positive, default=16, metavar="N", help="default 16")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 (default): the likeliest token")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw, where temperature is above 0")
    parser.add_argument("--stop-token", type=int, metavar="ID", help="default: the tokenizer's end of text")
    parser.add_argument("--json", action="store_true", help="print prompts, token ids and texts as JSON")


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of an evaluation."""
    parser.description = EVALUATE
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a finished export, TensorRT-LLM or Hugging Face")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE",
                        help="as of `calibrate`; a field summary (or highlights) is compared with ROUGE")  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, metavar="CHECKPOINT", help="also run what was exported")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of the tokenizer, default the export's")
    parser.add_argument("--text-field", metavar="NAME", help="field of the text, default text, article, …")
    parser.add_argument("--num-samples", type=positive, default=64, metavar="N", help="default 64")
    parser.add_argument("--sequence-length", type=positive, default=512, metavar="N", help="of a text, default 512")
    parser.add_argument("--batch-size", type=positive, default=4, metavar="N", help="texts of one length at a time")
    parser.add_argument("--rouge", action="store_true", help="also write summaries and compare them")
    parser.add_argument("--summary-prompt", default="{text}\nTL;DR:", metavar="TEXT", help="with {text}")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="of a summary, default 64")
    thresholds = parser.add_argument_group("thresholds")
    thresholds.add_argument("--max-perplexity", type=float, metavar="X", help="of the export")
    thresholds.add_argument("--max-perplexity-ratio", type=float, metavar="X", help="export's over the checkpoint's")
    thresholds.add_argument("--min-rouge-l", type=float, metavar="X", help="ROUGE-L F of the export, 0 to 1")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `add_source_arguments` that a model without quantisation has; the others have their defaults."""
    for name in ("iteration", "vocab-size"):
        parser.add_argument(f"--{name}", type=positive, metavar="N", help="as of `export`")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML or JSON with model configuration fields")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="one field; repeatable")
