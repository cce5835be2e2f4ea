"""``dist-export calibrate``: texts through the checkpoint's Megatron model, and what its quantisers saw into a file.

In one process, or as ranks of a launcher that hold the model together.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from dist_export import api, texts
from dist_export.arguments import overrides_of
from dist_export.calibrate.layout import Layout, choose_layout
from dist_export.calibrate.ranks import failing_together, union
from dist_export.convert.sources import SourceFiles
from dist_export.errors import ExportError
from dist_export.models.config import ModelConfig
from dist_export.quantization import QuantizationOptions
from dist_export.runtime import exit_codes
from dist_export.runtime.collective import shared_store
from dist_export.runtime.group import Group
from dist_export.runtime.run import run_here
from dist_export.runtime.world import detect_world
from dist_export.shared_index import open_together

if TYPE_CHECKING:
    import torch

    from dist_export.calibrate.places import Piece, Place
    from dist_export.tensors.boxes import Box


class CalibrationOptions(Struct, frozen=True, kw_only=True):
    """How to calibrate."""

    scheme: str
    data: tuple[Path, ...]
    tokenizer: Path | None = None
    text_field: str | None = None
    num_samples: int = 512
    sequence_length: int = 512
    batch_size: int = 1
    device: str = "cpu"
    """``cpu`` or ``cuda``: of several ranks each takes the GPU of its number on its node."""
    tp: int | None = None
    """None: the checkpoint's own where as many processes run as it needs, else what fits them."""
    pp: int | None = None


def calibrate_command(options: argparse.Namespace) -> int:
    """Calibrate what a command line names, as the rank that a launcher made this process, or alone."""
    names = ("scheme", "tokenizer", "text_field", "num_samples", "sequence_length", "batch_size", "device", "tp", "pp")
    chosen = CalibrationOptions(data=tuple(options.data), **{name: getattr(options, name) for name in names})
    source = api.Source(
        checkpoint=options.checkpoint,
        iteration=options.iteration,
        overrides=overrides_of(options),
        quantization=QuantizationOptions(algorithm="none", kv_cache="none"),
    )
    path: Path = options.calibration_file

    def rank_main(group: Group) -> int:
        with failing_together(group):
            if group.rank == 0:
                _check_file(path, overwrite=options.overwrite)
            done = calibrate(source, path, chosen, group=group)
        if group.rank == 0:
            print(f"{path}: {done.num_tensors} tensors of {chosen.scheme}, calibrated on {done.num_tokens} tokens")
            if group.world_size > 1:
                print(f"the model was held by {group.world_size} processes: {done.layout}")
            exported = f"{options.checkpoint} OUTPUT --quantization {chosen.scheme} --calibration {path}"
            print(f"next: dist-export export {exported}", flush=True)
        return exit_codes.OK

    return run_here(detect_world(os.environ), rank_main)


def _check_file(path: Path, *, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ExportError(f"{path}: exists already; give --overwrite to replace it")
    if not path.absolute().parent.is_dir():
        raise ExportError(f"{path.absolute().parent}: no such folder")


class Calibration(Struct, frozen=True):
    """What was done."""

    num_tensors: int
    """In the file; 0 on ranks that did not write it."""
    num_tokens: int
    layout: Layout


def calibrate(
    source: api.Source, path: Path, options: CalibrationOptions, *, group: Group | None = None
) -> Calibration:
    """Run the texts and write the calibration file, on rank 0; all ranks of `group` call it once (None: just one).

    No rank has a torch process group. Raises `ExportError` when the model cannot be built or laid out, the data cannot
    be read, or a linear was not calibrated, and PeerFailedError on the other ranks; the file is whole or not there.
    """
    group = group or Group.single()
    model = api.open_model(source, open_together(source, group))
    config, trained = model.resolved.config, model.checkpoint.training_layout
    if any(True for _ in model.quantizers.catalog.patterns()):
        raise ExportError(
            f"{source.checkpoint}: is quantised already; `dist-export export` takes it as it was calibrated"
        )
    own = Layout(trained.get("tp", 1), trained.get("pp", 1))
    layout = choose_layout(config, options.scheme, group.world_size, tp=options.tp, pp=options.pp, own=own)
    told = json.dumps(_sequences(options, config)).encode() if group.rank == 0 else None
    sequences: list[list[int]] = json.loads(group.broadcast("token ids", told))
    num_tensors = _run(model, sequences, path, options, group, layout)
    return Calibration(num_tensors, sum(map(len, sequences)), layout)


def _sequences(options: CalibrationOptions, config: ModelConfig) -> list[list[int]]:
    samples = texts.read_samples(options.data, limit=options.num_samples, text_field=options.text_field)
    needed = any(sample.tokens is None for sample in samples) and options.tokenizer is not None
    tokenizer = texts.load_tokenizer(options.tokenizer) if needed and options.tokenizer else None
    length = min(options.sequence_length, config.max_position_embeddings)
    return texts.token_ids(samples, tokenizer, vocab_size=config.vocab_size, length=length)


def _run(
    model: api.OpenedModel,
    sequences: Sequence[list[int]],
    path: Path,
    options: CalibrationOptions,
    group: Group,
    layout: Layout,
) -> int:
    """Returns the number of tensors, on rank 0."""
    try:
        import torch
    except ImportError as error:
        hint = "calibration needs torch; run: pip install 'dist-export[modelopt,megatron]'"
        raise ExportError(f"{hint} ({error})") from error
    from dist_export.calibrate.modelopt_adapter import calibrate as run_modelopt
    from dist_export.calibrate.places import place_of
    from dist_export.calibrate.shards import read_box
    from dist_export.verify.megatron_adapter import forward_stage, loaded_stage
    from dist_export.verify.megatron_environment import Ranks

    index, device = model.checkpoint.index, _device_of(options.device, group)
    ranks = Ranks(group.rank, layout.tp, layout.pp, shared_store(group) if group.world_size > 1 else None)

    def read(key: str, box: Box) -> torch.Tensor:
        found = read_box(files, key, box)
        group.progress.add(bytes_read=found.nbytes)  # else ranks that wait would take long work for a standstill
        return found

    with (
        closing(SourceFiles(index)) as files,
        loaded_stage(
            index,
            model.resolved.config,
            dtype=_dtype_of(model),
            read=read,
            device=device,
            ranks=ranks,
            together=functools.partial(union, group, step="keys of the model"),
        ) as (gpt, sources),
    ):
        group.barrier("model loaded")

        def run_texts() -> None:
            for batch in texts.equal_lengths(sequences, options.batch_size):
                forward_stage(gpt, torch.tensor(batch))
                group.progress.add(bytes_read=8 * sum(map(len, batch)))  # token ids

        def place(linear: str) -> Place:
            return place_of(sources[f"{linear}.weight"], index)

        found = run_modelopt(gpt, options.scheme, run_texts, place, tp_group=ranks.tp_group)
    whole = _gathered(found.pieces, group)
    if whole is None:
        return 0
    metadata = {
        "format": "pt",
        "scheme": options.scheme,
        "modelopt_version": found.version,
        "num_tokens": str(sum(map(len, sequences))),
        "checkpoint": str(index.origin),
    }
    _save(whole, path, metadata)
    return len(whole)


def _device_of(name: str, group: Group) -> str:
    """This rank's device; a GPU is made the current one, which NCCL and Megatron take."""
    if name == "cpu":
        return name
    import torch

    if not torch.cuda.is_available():
        raise ExportError(f"--device {name}: torch finds no GPU here")
    if group.world_size > 1:
        if name != "cuda" or group.world.local_rank >= torch.cuda.device_count():
            count = f"{torch.cuda.device_count()} GPUs, {group.world.local_world_size} processes"
            raise ExportError(f"--device {name}: each process takes one GPU (--device cuda); here are {count}")
        name = f"cuda:{group.world.local_rank}"
    name = "cuda:0" if name == "cuda" else name
    torch.cuda.set_device(name)
    return name


def _dtype_of(model: api.OpenedModel) -> torch.dtype:
    """What the model computes in: the element type of its weights, routers in float32 aside."""
    import torch

    stored = {each.dtype for each in model.checkpoint.index.tensors.values()} & {"bfloat16", "float16", "float32"}
    narrow = stored - {"float32"} or stored
    return getattr(torch, narrow.pop()) if len(narrow) == 1 else torch.bfloat16


def _gathered(pieces: Sequence[Piece], group: Group) -> dict[str, torch.Tensor] | None:
    """On rank 0 the whole tensors of what all ranks hold, None elsewhere."""
    from dist_export.calibrate.places import decode, encode, merge

    parts: dict[int, Sequence[Piece]] = {}

    def take(rank: int, packed: bytes) -> None:
        parts[rank] = pieces if rank == 0 else list(decode(packed))

    group.gather_each("calibration", b"" if group.rank == 0 else encode(pieces), take)
    return merge(parts) if group.rank == 0 else None


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
