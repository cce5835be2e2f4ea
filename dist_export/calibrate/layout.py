"""Over how many tensor- and pipeline-parallel ranks a calibration runs. Pure: imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec import Struct

from dist_export.errors import ExportError, Faults
from dist_export.models.blocks import Block
from dist_export.models.config import ModelConfig

BLOCK_COLUMNS: Mapping[str, int] = {"int4_awq": 128}
"""Scheme -> columns that share a stored scale, where there are such: a rank must hold whole blocks."""


class Layout(Struct, frozen=True):
    """Tensor- and pipeline-parallel sizes. No model is held twice: there are tp x pp processes."""

    tp: int
    pp: int

    def __str__(self) -> str:
        return f"tp {self.tp} x pp {self.pp}"


def choose_layout(
    config: ModelConfig, scheme: str, world_size: int, *, tp: int | None, pp: int | None, own: Layout
) -> Layout:
    """The layout that was asked for; else the checkpoint's own; else the one with the largest tp that fits.

    `own` is the layout of the training run. Raises `ExportError` where none fits the number of processes, or the asked
    one does not.
    """
    if tp is not None or pp is not None:
        known = (tp or 1) * (pp or 1)
        asked = Layout(tp or world_size // known or 1, pp or world_size // known or 1)
        _check(config, scheme, asked, world_size)
        return asked
    fitting = [layout for layout in _layouts(world_size) if not any(_misfits(config, scheme, layout))]
    if own in fitting:
        return own
    if not fitting:
        faults = Faults(f"{world_size} processes cannot share this model; start fewer")
        for layout in _layouts(world_size):
            faults.add(f"{layout}: {next(_misfits(config, scheme, layout))}")
        faults.raise_if_any()
    return fitting[0]


def _layouts(world_size: int) -> list[Layout]:
    return [Layout(tp, world_size // tp) for tp in range(world_size, 0, -1) if world_size % tp == 0]


def _check(config: ModelConfig, scheme: str, layout: Layout, world_size: int) -> None:
    needed = layout.tp * layout.pp
    if needed != world_size:
        start = f"torchrun --nproc-per-node {needed} -m dist_export calibrate … --tp {layout.tp} --pp {layout.pp}"
        are = "is 1 process" if world_size == 1 else f"are {world_size} processes"
        raise ExportError(f"{layout} needs {needed} processes, there {are}; start them so: {start}")
    faults = Faults(f"{layout} does not fit this model")
    faults.extend(_misfits(config, scheme, layout))
    faults.raise_if_any()


def _misfits(config: ModelConfig, scheme: str, layout: Layout) -> Iterator[str]:
    """Why a model cannot be laid out so, as Megatron-Core divides it."""
    tp, pp = layout.tp, layout.pp
    if pp > config.num_layers:
        yield f"{config.num_layers} layers are fewer than {pp} pipeline stages"
    if tp == 1:
        return
    if config.kv_lora_rank:
        yield "multi-latent attention is calibrated with tp 1"
    if config.num_experts and config.linear_bias:
        yield "experts with biases are calibrated with tp 1"
    yield from _undivided(config, tp)
    block = BLOCK_COLUMNS.get(scheme, 1)
    for what, columns in _row_parallel_columns(config).items():
        if columns % tp == 0 and columns // tp % block:
            yield f"{scheme} scales blocks of {block} columns, a rank would hold {columns // tp} of {what}"


def _undivided(config: ModelConfig, tp: int) -> Iterator[str]:
    groups = {config.num_query_groups} | {each.num_query_groups for each in _blocks(config) if each.num_query_groups}
    for number in sorted(groups):
        if number % tp and tp % number:
            yield f"{number} key-value heads are no multiple of tp {tp}, nor the other way round"
    numbers = {
        "attention heads": config.num_attention_heads,
        "rows of the embedding": config.padded_vocab_size,
        **{what: columns for what, columns in _row_parallel_columns(config).items() if what != "attention's output"},
    }
    yield from (f"{number} {what} are no multiple of tp {tp}" for what, number in numbers.items() if number % tp)


def _row_parallel_columns(config: ModelConfig) -> dict[str, int]:
    """What the columns of weights belong to, which tensor parallelism divides -> their number."""
    found = {"attention's output": config.num_attention_heads * (config.value_head_size or config.head_size)}
    if not config.num_experts or config.moe_layer_freq is not None:
        found["columns of the MLP"] = config.ffn_hidden_size
    found |= {
        f"columns of the MLP of layer {number}": each.ffn_hidden_size
        for number, each in enumerate(_blocks(config))
        if each.ffn_hidden_size
    }
    found["columns of an expert"] = config.moe_ffn_hidden_size if config.num_experts else 0
    found["columns of the shared expert"] = config.moe_shared_expert_ffn_hidden_size
    return {what: number for what, number in found.items() if number}


def _blocks(config: ModelConfig) -> tuple[Block, ...]:
    return () if config.blocks is None else config.blocks.layers
