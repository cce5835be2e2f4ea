"""`live_models` with trials of `dist_export.live.iterate`: same command line.

Beside a trial's tensors, every rank writes what it saw of the buckets to OUT/live/NAME/seen{R}.json.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Iterator
from typing import Any

import live_models
from live_models import Weights

BUCKET_BYTES = 24 << 10


def _taken(chunks: list[Any], options: argparse.Namespace, name: str, target: Any, **more: Any) -> Weights:
    """All buckets of a rank, copied; what was seen of them is written beside."""
    import torch

    from dist_export.live import buckets, run
    from dist_export.megatron_export.values import RankConfig

    exports: list[Any] = []
    prepared = run.LiveExport.buckets

    def watched(self: Any, files: Any) -> Any:
        exports.append(self)
        return prepared(self, files)

    run.LiveExport.buckets = watched  # type: ignore[method-assign]
    more = {"bucket_bytes": BUCKET_BYTES, "vocab_size": options.vocab, **more}
    try:
        kept, sizes, alive = _copied(buckets(more.pop("model", chunks), target, **more))
    finally:
        run.LiveExport.buckets = prepared  # type: ignore[method-assign]
    rank = torch.distributed.get_rank()
    seen = {
        "buckets": sizes,
        "names": list(kept),
        "received": exports[0].most_bytes_received,
        "moved": exports[0].num_bytes_received,
        "still_alive": alive,
        "bound": BUCKET_BYTES,
    }
    folder = options.out / "live" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"seen{rank}.json").write_text(json.dumps(seen))
    return [kept], [RankConfig({}, rank)]


def _copied(found: Iterator[list[tuple[str, Any]]]) -> tuple[dict[str, Any], list[list[int]], int]:
    """Copies by name, the sizes of each bucket's tensors, and how many tensors outlived their bucket."""
    kept: dict[str, Any] = {}
    sizes: list[list[int]] = []
    earlier: list[weakref.ref[Any]] = []
    alive = 0
    for bucket in found:
        alive += sum(each() is not None for each in earlier)
        assert all(each.untyped_storage().nbytes() == each.nbytes for _, each in bucket)
        kept |= {name: each.clone() for name, each in bucket}
        sizes.append([each.nbytes for _, each in bucket])
        earlier = [weakref.ref(each) for _, each in bucket]
        del bucket
    return kept, sizes, alive


def _trtllm(chunks: list[Any], options: argparse.Namespace, style: Any) -> Weights:
    from dist_export.targets.trtllm.target import TrtllmOptions

    tp, pp = options.target
    return _taken(chunks, options, "buckets_trtllm", TrtllmOptions(tp_size=tp, pp_size=pp, dtype=options.dtype))


def _hugging_face(chunks: list[Any], options: argparse.Namespace, style: Any) -> Weights:
    return _taken(chunks, options, "buckets_hf", _hugging_face_options(options))


def _one_receiver(chunks: list[Any], options: argparse.Namespace, style: Any) -> Weights:
    """State dicts in place of models, and rank 1 alone receives."""
    import torch

    from dist_export.live.configuration import model_fields_of

    return _taken(
        chunks,
        options,
        "buckets_one",
        _hugging_face_options(options),
        model=[chunk.state_dict() for chunk in chunks],
        transformer_config=chunks[0].config,
        model_fields=model_fields_of(chunks[0]),
        receive=torch.distributed.get_rank() == 1,
    )


def _stopping(chunks: list[Any], options: argparse.Namespace, style: Any) -> Weights:
    """Rank 1 takes three tensors and goes; what the others are told."""
    import torch

    from dist_export.errors import ExportError
    from dist_export.live import iterate

    rank, message = torch.distributed.get_rank(), ""
    found = iterate(chunks, _hugging_face_options(options), bucket_bytes=BUCKET_BYTES, vocab_size=options.vocab)
    try:
        for number, _ in enumerate(found):
            if rank == 1 and number == 2:
                break
        found.close()  # type: ignore[attr-defined]
    except ExportError as error:
        message = str(error)
    folder = options.out / "live" / "buckets_stopping"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"message{rank}").write_text(message)
    return [], []


def _hugging_face_options(options: argparse.Namespace) -> Any:
    from dist_export.targets.huggingface.target import HuggingFaceOptions

    return HuggingFaceOptions(dtype=options.dtype)


live_models.TRIALS |= {
    "buckets_trtllm": _trtllm,
    "buckets_hf": _hugging_face,
    "buckets_one": _one_receiver,
    "buckets_stopping": _stopping,
}

if __name__ == "__main__":
    live_models.main()
