"""The weights of a live model under a target's names, bucket by bucket: for `update_weights` and for refit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import torch

from dist_export.api import OpenedModel, TargetOptions, plan
from dist_export.errors import ExportError
from dist_export.live.configuration import arguments_of, model_fields_of
from dist_export.live.memory import RankMemory
from dist_export.live.model import open_live, te_scales
from dist_export.live.opening import Ranks, gathered_objects, table_of
from dist_export.live.run import Bucket, LiveExport, Peers
from dist_export.live.table import LiveTable
from dist_export.plan.export import ExportPlan
from dist_export.quantization import QuantizationOptions
from dist_export.targets.huggingface.target import HuggingFaceOptions

BUCKET_BYTES = 256 << 20


def iterate(model: Any, target: TargetOptions, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """`buckets`, tensor by tensor: (name, tensor). Same arguments, order, bound, and calls.

    A tensor that the caller lets go of is freed at once, before the rest of its bucket.
    """
    return _each(buckets(model, target, **options))


def _each(found: Iterator[Bucket]) -> Iterator[tuple[str, torch.Tensor]]:
    with closing(found):  # type: ignore[type-var]  # a generator
        for bucket in found:
            bucket.reverse()
            while bucket:
                yield bucket.pop()


def buckets(
    model: Any,
    target: TargetOptions,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    target_rank: int | None = None,
    receive: bool = True,
    device: Any = None,
    group: Any = None,
    vocab_size: int | None = None,
    quantization: QuantizationOptions | None = None,
    transformer_config: Any = None,
    model_fields: Mapping[str, object] | None = None,
) -> Iterator[Bucket]:
    """The model's weights as `target` wants them: lists of (name, tensor), each tensor with memory of its own.

    Collective over `group`, here and at every step: all ranks call it with the same target and sizes and take all their
    buckets, also those that receive nothing (``for _ in iterate(…): pass``). The model must not change meanwhile.

    *Who gets what.* Hugging Face: all tensors, whole and under their full names, on every rank that receives. For
    TensorRT-LLM: those of one target rank's file, for any layout; by default rank r of the group gets target rank r,
    and ranks beyond the last get none. More target ranks than processes take several calls, each with a `target_rank`.

    *Order.* That of the model: embeddings, layers by number, then head and final norm; the scales of a quantised
    weight follow it. It is the same in every run, and for Hugging Face on every rank.

    *Bound.* A bucket holds at most `bucket_bytes` of target tensors; a tensor larger than that is a bucket alone.
    Beside the model and the tensors that the caller keeps, a rank's memory is one bucket; the source elements of it
    that the rank lacks (as many as the bucket has elements, in the model's element type); what it sends meanwhile,
    packed once for receivers that want the same (Hugging Face: its part of one bucket; TensorRT-LLM: at most its part
    of one bucket per receiver); and a few MiB per thread. What was received and sent is given up before the bucket is
    yielded, and the next bucket is made only when it is asked for. Some layers are copied when the table is made (a
    grouped MLP's transposed experts).

    *A rank that stops early* (closes its iterator, lets go of it, or fails in a bucket) makes the others raise
    `ExportError` naming it when they ask for their next bucket. One that keeps its iterator and asks no more, or dies
    without a word, holds them until the process group's own timeout.

    Args:
        model: A ``GPTModel`` (also wrapped), a list of them (virtual pipeline stages), or what their
            ``sharded_state_dict()`` or ``state_dict()`` returns; then with `transformer_config` and `model_fields`.
        target: `TrtllmOptions` or `HuggingFaceOptions`.
        bucket_bytes: The bound, bytes of target tensors.
        target_rank: The TensorRT-LLM rank whose tensors this process gets.
        receive: False on ranks that only send.
        device: Where tensors go; by default where the model is. They are made on the CPU, and moved there one by one.
        group: A torch.distributed process group that holds the whole model; None is all processes, and a single process
            needs none. Gloo moves bytes through host memory, NCCL through the current CUDA device.
        vocab_size: The true vocabulary; without it padding rows are exported as well.
        quantization: As for an export of files; "fp8" measures weights over all ranks.
        transformer_config: Megatron's, where `model` is a state dict.
        model_fields: Of ``GPTModel``, as `dist_export.live.configuration.MODEL_FIELDS` lists them.

    Raises `ExportError` for whatever cannot be exported exactly, before the first bucket wherever the plan tells.
    """
    if bucket_bytes < 1:
        raise ExportError(f"bucket_bytes is {bucket_bytes}, expected at least 1")
    peers = Peers.of_group(group)
    states, arguments = _described(model, transformer_config, model_fields)
    table, memory, opened = _opened(states, arguments, peers, vocab_size, quantization or QuantizationOptions())
    export_plan = plan(opened, target)
    wanted = peers.gather(_wanted(target, export_plan, peers, target_rank) if receive else None)
    files = [_files(each, export_plan, rank) for rank, each in enumerate(wanted)]
    export = LiveExport(export_plan, table, memory, peers, round_bytes=bucket_bytes)
    made = export.buckets(files)
    place = torch.device(memory.device if device is None else device)
    return made if place.type == "cpu" else _moved(made, place)


def _moved(made: Iterator[Bucket], device: torch.device) -> Iterator[Bucket]:
    with closing(made):  # type: ignore[type-var]  # a generator
        for bucket in made:
            for number, (name, tensor) in enumerate(bucket):
                bucket[number] = (name, tensor.to(device))
            yield bucket


_ALL = -1


def _wanted(target: TargetOptions, export_plan: ExportPlan, peers: Peers, target_rank: int | None) -> int | None:
    """The target rank that this rank gets; `_ALL`, or None for nothing."""
    if isinstance(target, HuggingFaceOptions):
        return _ALL
    if target_rank is not None:
        return target_rank
    return peers.rank if peers.rank < export_plan.num_files else None


def _files(wanted: int | None, export_plan: ExportPlan, rank: int) -> list[int]:
    if wanted is None:
        return []
    if wanted == _ALL:
        return list(range(export_plan.num_files))
    if not 0 <= wanted < export_plan.num_files:
        raise ExportError(f"rank {rank} asks for target rank {wanted} of {export_plan.num_files}: expected 0 and up")
    return [wanted]


def _described(
    model: Any, transformer_config: Any, model_fields: Mapping[str, object] | None
) -> tuple[list[Mapping[str, Any]], dict[str, object]]:
    """This rank's states and the model's arguments."""
    parts = list(model) if isinstance(model, list | tuple) else [model]
    if parts and all(isinstance(part, Mapping) for part in parts):
        if transformer_config is None:
            raise ExportError("a state dict does not tell the model's configuration: give transformer_config")
        return parts, arguments_of(transformer_config, **(model_fields or {}))
    models = [_unwrapped(part) for part in parts]
    if not models:
        raise ExportError("no model was given")
    fields = {**model_fields_of(models[0]), **(model_fields or {})}
    arguments = arguments_of(transformer_config or models[0].config, **fields)
    return [part.sharded_state_dict(metadata=_metadata()) for part in models], arguments


def _unwrapped(model: Any) -> Any:
    """The ``GPTModel`` within DDP and Float16Module."""
    while hasattr(model, "module") and not hasattr(model, "position_embedding_type"):
        model = model.module
    if not hasattr(model, "sharded_state_dict") or not hasattr(model, "position_embedding_type"):
        raise ExportError(f"{type(model).__name__} is neither a GPTModel of Megatron-Core nor a state dict")
    return model


def _metadata() -> dict[str, object]:
    """What layers of recent releases expect in `sharded_state_dict`."""
    from megatron.core import parallel_state

    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _opened(
    states: list[Mapping[str, Any]],
    arguments: dict[str, object],
    peers: Peers,
    vocab_size: int | None,
    quantization: QuantizationOptions,
) -> tuple[LiveTable, RankMemory, OpenedModel]:
    ranks = Ranks.of_megatron() if peers.world_size > 1 else Ranks()
    arguments = {**arguments, **ranks.arguments()}
    if "share_embeddings_and_output_weights" in arguments:
        arguments["untie_embeddings_and_output_weights"] = not arguments["share_embeddings_and_output_weights"]
    table, memory, _ = table_of(states, arguments, ranks, peers)
    found = te_scales(table, gathered_objects(table, memory, peers), quantization, arguments)
    overrides = {} if vocab_size is None else {"vocab_size": (vocab_size, "vocab_size")}
    return table, memory, open_live(table, arguments, overrides=overrides, quantization=quantization, te=found)
