"""Weights that depend on a seed and a tensor's name only: not on tp, pp, ep, the key layout or the library versions.

Every element is drawn from a Philox bit stream (whose output NumPy guarantees) and scaled by one IEEE
multiplication, so the same seed gives the same bytes on any machine.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")
_STACKED_LAYERS = re.compile(r"(?<=decoder)\.layers\.(?!\d)")
_STACKED_EXPERTS = re.compile(r"\.experts\.experts\.(?!\d)")
_GATE_OR_UP = re.compile(r"(.*\.linear_fc1\.(?:weight|bias))_([wv])")


def random_codes(name: str, *, seed: int, count: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    """`count` int16 drawn uniformly from the stream that (seed, name) selects."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(-(-count // 4))
    return np.asarray(words, dtype="<u8").view("<i2")[:count].astype(np.int16)


def random_tensor(name: str, shape: tuple[int, ...], *, seed: int, zero_centered_gamma: bool) -> torch.Tensor:
    """The whole tensor `name`, fp32.

    Norm weights are multiples of 2^-7 within half of one (of zero when `zero_centered_gamma`), which bf16 holds
    exactly with and without the one added. Everything else is uniform with the spread of 1 / sqrt(last dim).
    """
    codes = torch.from_numpy(random_codes(name, seed=seed, count=math.prod(shape))).reshape(shape)
    if re.search(r"norm(_|\.)weight$", name):
        steps = (codes.to(torch.int32) & 127) - 64
        return steps.to(torch.float32) / 128 + (0.0 if zero_centered_gamma else 1.0)
    return codes.to(torch.float32) * (1.7 / 32768 / math.sqrt(shape[-1] if len(shape) > 1 else 64))


def random_vocabulary(name: str, shape: tuple[int, ...], *, vocab: int, seed: int) -> torch.Tensor:
    """A [padded vocabulary, hidden] tensor, fp32, whose first `vocab` rows do not depend on the padding."""
    true_rows = random_tensor(name, (vocab, shape[1]), seed=seed, zero_centered_gamma=False)
    padding = random_tensor(f"{name}#padding", (shape[0] - vocab, shape[1]), seed=seed, zero_centered_gamma=False)
    return torch.cat([true_rows, padding])


def fill_chunks(chunks: Iterable[Any], *, seed: int, vocab: int, zero_centered_gamma: bool) -> None:
    """Set every parameter of this rank's model chunks, in its own dtype. `vocab` is the true vocabulary size.

    Parameters that Megatron cuts or transposes to save them are filled as they are saved and put back by the
    functions that load them.
    """
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    how: dict[str, Any] = {"seed": seed, "vocab": vocab, "zero_centered_gamma": zero_centered_gamma}
    with torch.no_grad():
        for chunk in chunks:
            for value in nested_values(chunk.sharded_state_dict(metadata=metadata)):
                if isinstance(value, ShardedTensorFactory):
                    value.data.copy_(value.merge_fn(_filled(value.build(), how)))
                elif isinstance(value, ShardedTensor):
                    _fill(value, **how)


def _filled(saved: Any, how: dict[str, Any]) -> Any:
    """What a factory would save, as plain tensors with their values."""
    if isinstance(saved, dict):
        return {name: _filled(value, how) for name, value in saved.items()}
    if isinstance(saved, list):
        return [_filled(value, how) for value in saved]
    saved.data = saved.data.clone()
    _fill(saved, **how)
    return saved.data


def _fill(shard: Any, *, seed: int, vocab: int, zero_centered_gamma: bool) -> None:
    for piece in pieces(shard):
        if piece.name in _VOCABULARY_KEYS:
            whole = random_vocabulary(piece.name, piece.shape, vocab=vocab, seed=seed)
        else:
            whole = random_tensor(piece.name, piece.shape, seed=seed, zero_centered_gamma=zero_centered_gamma)
        box = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.data.shape, strict=True))
        piece.data.copy_(whole[box])


@dataclass(frozen=True)
class Piece:
    """A box of one layer's (and expert's) tensor: its global name and shape, and where the box begins."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: torch.Tensor


def pieces(shard: Any) -> Iterator[Piece]:
    """A Megatron ShardedTensor by layers and experts, whichever of them its key is stacked over.

    `decoder.layers.mlp.experts.experts…` becomes `decoder.layers.{layer}.mlp.experts.experts.{expert}…`; the gate
    and up parts that the singleton layout keeps under two keys become the halves of one tensor.
    """
    name, shape, offset = shard.key, tuple(shard.global_shape), tuple(shard.global_offset)
    prepended = shard.prepend_axis_num
    if _STACKED_LAYERS.search(name):
        name = _STACKED_LAYERS.sub(f".layers.{offset[0]}.", name)
        shape, offset, prepended = shape[1:], offset[1:], prepended - 1
    if not _STACKED_EXPERTS.search(name):
        yield _with_both_halves(Piece(name, shape, offset, shard.data))
        return
    experts = [shard.data] if prepended else shard.data  # GroupedMLP keeps the experts of a rank in one tensor
    for expert, data in enumerate(experts, offset[0]):
        yield Piece(_STACKED_EXPERTS.sub(f".experts.experts.{expert}.", name), shape[1:], offset[1:], data)


def _with_both_halves(piece: Piece) -> Piece:
    match = _GATE_OR_UP.fullmatch(piece.name)
    if match is None:
        return piece
    name, part = match.groups()
    rows = piece.shape[0]
    offset = (piece.offset[0] + (rows if part == "v" else 0), *piece.offset[1:])
    return Piece(name, (2 * rows, *piece.shape[1:]), offset, piece.data)
