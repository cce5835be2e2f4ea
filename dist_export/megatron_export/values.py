"""Values of the migration surface, and reading those of Megatron-Core by their names."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msgspec import Struct

from dist_export.errors import ExportError

DTYPES = ("bfloat16", "float16", "float32")
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "gpt": ("gpt",),
    "gptnext": ("nemotron", "gpt"),
    "llama": ("llama", "mistral", "mixtral", "qwen2", "qwen3"),
    "falcon": ("falcon",),
    "starcoder": ("starcoder2", "starcoder"),
    "mixtral": ("mixtral",),
    "gemma": ("gemma", "gemma2"),
    "nemotron_nas": ("decilm",),
}
"""``ModelType`` (megatron/core/export/model_type.py) -> the families here that it stood for."""


@dataclass
class ExportConfig:
    """The target layout: a dataclass, as in megatron/core/export/export_config.py; theirs is accepted as well."""

    inference_tp_size: int = 1
    inference_pp_size: int = 1
    use_parallel_embedding: bool = False
    use_embedding_sharing: bool | None = None
    """Ignored, as there: sharing is `share_embeddings_and_output_weights` of the helper."""


class RankConfig(Struct, frozen=True):
    """The configuration of one target rank: the contents of ``config.json``, and the rank."""

    values: Mapping[str, Any]
    rank: int

    @property
    def architecture(self) -> str:
        return str(self.values["architecture"])

    @property
    def world_size(self) -> int:
        return int(self.values["mapping"]["world_size"])

    def to_pretrained_config(self) -> Any:
        """TensorRT-LLM's ``PretrainedConfig`` with the rank set. Imports tensorrt_llm; `ExportError` without it."""
        from dist_export.engines.adapter import pretrained_config

        return pretrained_config(copy.deepcopy(dict(self.values)), self.rank)


def dtype_name(value: object) -> str:
    """``bfloat16``, of a ``DataType``, a string or a torch dtype."""
    name = str(getattr(value, "name", value)).removeprefix("torch.")
    if name not in DTYPES:
        raise ExportError(f"dtype {name}: expected one of {', '.join(DTYPES)}")
    return name


def check_model_type(value: object, family: str) -> None:
    """Raise `ExportError` when the model is of another family than the ``ModelType`` says."""
    name = str(getattr(value, "name", value))
    if name not in FAMILIES:
        raise ExportError(f"model_type {name}: expected one of {', '.join(FAMILIES)}")
    if family not in FAMILIES[name]:
        raise ExportError(f"model_type is {name}, but the model's configuration and tensors are those of {family}")


def check_activation(activation: str, transformer_config: Any) -> None:
    """Raise `ExportError` when `activation`, unless it is its default, says something else than the configuration."""
    function = getattr(transformer_config, "activation_func", None)
    gated = bool(getattr(transformer_config, "gated_linear_unit", False))
    name = str(getattr(function, "__name__", function)).rpartition(".")[2]
    expected = {"silu": "swiglu" if gated else "silu", "gelu": "geglu" if gated else "gelu"}.get(name, name)
    given = activation.removeprefix("fast-").replace("-", "_").replace("openai_gelu", "gelu")
    if activation != "gelu" and function is not None and given not in (expected, expected.removesuffix("_")):
        raise ExportError(
            f"activation is {activation}, but transformer_config computes {name}{' with a gate' if gated else ''}"
        )
