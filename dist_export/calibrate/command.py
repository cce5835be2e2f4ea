"""``dist-export calibrate``: texts through the checkpoint's Megatron model, and what its quantisers saw into a file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dist_export import api, texts
from dist_export.arguments import overrides_of
from dist_export.errors import ExportError
from dist_export.quantization import QuantizationOptions
from dist_export.runtime import exit_codes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """How to calibrate."""

    scheme: str
    data: tuple[Path, ...]
    tokenizer: Path | None = None
    text_field: str | None = None
    num_samples: int = 512
    sequence_length: int = 512
    batch_size: int = 1
    device: str = "cpu"


def calibrate_command(options: argparse.Namespace) -> int:
    """Calibrate what a command line names."""
    path: Path = options.calibration_file
    if path.exists() and not options.overwrite:
        raise ExportError(f"{path}: exists already; give --overwrite to replace it")
    if not path.absolute().parent.is_dir():
        raise ExportError(f"{path.absolute().parent}: no such folder")
    names = ("scheme", "tokenizer", "text_field", "num_samples", "sequence_length", "batch_size", "device")
    chosen = CalibrationOptions(data=tuple(options.data), **{name: getattr(options, name) for name in names})
    source = api.Source(
        checkpoint=options.checkpoint,
        iteration=options.iteration,
        overrides=overrides_of(options),
        quantization=QuantizationOptions(algorithm="none", kv_cache="none"),
    )
    num_tensors, num_tokens = calibrate(source, path, chosen)
    print(f"{path}: {num_tensors} tensors of {chosen.scheme}, calibrated on {num_tokens} tokens")
    print(f"next: dist-export export {options.checkpoint} OUTPUT --quantization {chosen.scheme} --calibration {path}")
    return exit_codes.OK


def calibrate(source: api.Source, path: Path, options: CalibrationOptions) -> tuple[int, int]:
    """Write the calibration file; returns the number of its tensors and of the tokens that were run.

    Called in one process without a torch process group. Raises `ExportError` when the model cannot be built, the data
    cannot be read, or a linear was not calibrated; the file is whole or not there.
    """
    model = api.open_model(source)
    config = model.resolved.config
    if any(True for _ in model.quantizers.catalog.patterns()):
        raise ExportError(
            f"{source.checkpoint}: is quantised already; `dist-export export` takes it as it was calibrated"
        )
    samples = texts.read_samples(options.data, limit=options.num_samples, text_field=options.text_field)
    needed = any(sample.tokens is None for sample in samples) and options.tokenizer is not None
    tokenizer = texts.load_tokenizer(options.tokenizer) if needed and options.tokenizer else None
    length = min(options.sequence_length, config.max_position_embeddings)
    sequences = texts.token_ids(samples, tokenizer, vocab_size=config.vocab_size, length=length)
    _run(model, sequences, path, options)
    from dist_export.tensors.safetensors_format import read_header

    return len(read_header(path)), sum(map(len, sequences))


def _run(model: api.OpenedModel, sequences: Sequence[list[int]], path: Path, options: CalibrationOptions) -> None:
    try:
        import torch
    except ImportError as error:
        hint = "calibration needs torch; run: pip install 'dist-export[modelopt,megatron]'"
        raise ExportError(f"{hint} ({error})") from error
    from dist_export.calibrate.modelopt_adapter import calibrate as run_modelopt
    from dist_export.verify.megatron_adapter import forward, loaded_model

    index = model.checkpoint.index
    stored = {each.dtype for each in index.tensors.values() if each.dtype in ("bfloat16", "float16", "float32")}
    narrow = stored - {"float32"} or stored  # routers may be in float32
    dtype = getattr(torch, narrow.pop()) if len(narrow) == 1 else torch.bfloat16

    with loaded_model(index, model.resolved.config, dtype=dtype, device=options.device) as gpt:

        def run_texts() -> None:
            for batch in texts.equal_lengths(sequences, options.batch_size):
                forward(gpt, torch.tensor(batch))

        found = run_modelopt(gpt, options.scheme, run_texts)
    metadata = {
        "format": "pt",
        "scheme": options.scheme,
        "modelopt_version": found.version,
        "num_tokens": str(sum(map(len, sequences))),
        "checkpoint": str(index.origin),
    }
    _save(found.tensors, path, metadata)


def _save(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on nothing but its content; it is whole or not there."""
    import torch

    from dist_export.tensors.dtypes import DType, dtype_by_name
    from dist_export.tensors.safetensors_format import build_header

    entries: list[tuple[str, DType, tuple[int, ...], int]] = []
    data = bytearray()
    for name in sorted(tensors):
        dtype = dtype_by_name(str(tensors[name].dtype).removeprefix("torch."))
        entries.append((name, dtype, tuple(tensors[name].shape), len(data)))
        data += tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(build_header(entries, metadata=metadata) + data)
        partial.replace(path)
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
