"""Models that take token ids and give logits: of either kind of export, of an engine, of the checkpoint itself.

Importing this module imports torch; what else is needed is imported when a model is opened.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from msgspec import Struct

from dist_export.api import OpenedModel
from dist_export.errors import ExportError


class Runner(Struct, frozen=True):
    """A model, ready to be run."""

    name: str
    """What computes it."""
    vocab_size: int
    """Without padding."""
    max_positions: int
    logits: Callable[[torch.Tensor], torch.Tensor]
    """Token ids [batch, position] -> [batch, position, vocabulary] in float32."""


UNLIMITED = 1 << 30
"""Positions of a model whose configuration names no limit."""


def open_export(folder: Path) -> Runner:
    """The reference runner of an export. `ExportError` for what is none, or cannot be run."""
    if export_kind(folder) == "trtllm":
        from dist_export.verify.trtllm_interpreter import TrtllmModel

        engine = TrtllmModel.open(folder)
        positions = int(engine.config.raw.get("max_position_embeddings") or UNLIMITED)
        return Runner("TensorRT-LLM reference interpreter", engine.config.vocab_size, positions, engine.logits)
    from dist_export.verify.huggingface_adapter import load_decoded

    model = load_decoded(folder)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits.float()
        return found

    positions = int(getattr(model.config, "max_position_embeddings", None) or UNLIMITED)
    return Runner("transformers", int(model.config.vocab_size), positions, logits)


def export_kind(folder: Path) -> str:
    """``trtllm`` or ``hf``."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        inner = [name for name in ("trtllm", "hf") if (folder / name / "config.json").is_file()]
        if inner:
            raise ExportError(f"{folder}: holds several exports; name one of {', '.join(inner)} in it") from error
        raise ExportError(f"{path}: cannot be read: {error}; give the folder of a finished export") from error
    if isinstance(config, dict) and "mapping" in config:
        return "trtllm"
    if isinstance(config, dict) and "model_type" in config:
        return "hf"
    raise ExportError(f"{path}: has neither mapping (TensorRT-LLM) nor model_type (Hugging Face); not an export")


@contextlib.contextmanager
def open_checkpoint_model(model: OpenedModel) -> Iterator[Runner]:
    """The checkpoint's own model in float32, within the context.

    Called in one process without a torch process group. Raises `ExportError` for quantised checkpoints and for what
    Megatron-Core cannot build here.
    """
    from dist_export.verify.megatron_adapter import forward, loaded_model

    if any(True for _ in model.quantizers.catalog.patterns()):
        raise ExportError(f"{model.checkpoint.index.origin}: ModelOpt has quantised it; give the one before that")
    config = model.resolved.config
    with loaded_model(model.checkpoint.index, config, dtype=torch.float32) as gpt:

        def logits(tokens: torch.Tensor) -> torch.Tensor:
            return forward(gpt, tokens)[..., : config.vocab_size].float()

        yield Runner("Megatron-Core", config.vocab_size, config.max_position_embeddings, logits)
