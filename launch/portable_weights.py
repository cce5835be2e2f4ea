"""Weights that depend on a seed and a tensor's name only: not on tp, pp, the key layout or the library versions.

Every element is drawn from a Philox bit stream (whose output NumPy guarantees) and scaled by one IEEE
multiplication, so the same seed gives the same bytes on any machine.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

_VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")
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


def global_box(shard: Any) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Name, shape and offsets of a Megatron ShardedTensor in its per-layer form.

    Stacked keys (`decoder.layers.mlp…`, a leading layer dim) become `decoder.layers.{layer}.mlp…`; the gate and up
    parts that the singleton layout keeps under two keys become the halves of one tensor.
    """
    name, shape, offset = shard.key, tuple(shard.global_shape), tuple(shard.global_offset)
    if shard.prepend_axis_num:
        name = name.replace(".layers.", f".layers.{offset[0]}.", 1)
        shape, offset = shape[1:], offset[1:]
    if match := _GATE_OR_UP.fullmatch(name):
        name, part = match.groups()
        offset = (offset[0] + (shape[0] if part == "v" else 0), *offset[1:])
        shape = (2 * shape[0], *shape[1:])
    return name, shape, offset


def fill(shards: Iterable[Any], *, seed: int, vocab: int, zero_centered_gamma: bool) -> None:
    """Set the data of every ShardedTensor of this rank, in its own dtype. `vocab` is the true vocabulary size."""
    with torch.no_grad():
        for shard in shards:
            name, shape, offset = global_box(shard)
            if name in _VOCABULARY_KEYS:
                whole = random_vocabulary(name, shape, vocab=vocab, seed=seed)
            else:
                whole = random_tensor(name, shape, seed=seed, zero_centered_gamma=zero_centered_gamma)
            box = tuple(slice(o, o + n) for o, n in zip(offset, shard.data.shape, strict=True))
            shard.data.copy_(whole[box])
