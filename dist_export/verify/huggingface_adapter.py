"""Logits of a Hugging Face folder, computed by transformers.

Importing this module imports torch; transformers is imported when it runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct

from dist_export.errors import ExportError, Faults
from dist_export.verify import trace as at
from dist_export.verify.decoding import decoded_state, is_quantised
from dist_export.verify.trace import Point, Trace

INSTALL_HINT = "logits of a Hugging Face folder are computed by transformers; run: pip install transformers"
_ATTENTION = "dist_export_recording"


class Modules(Struct, frozen=True):
    """Where an architecture's modules are: paths from the model, and from a layer."""

    layers: str
    embedding: str | None
    """None where what it returns is scaled afterwards."""
    final_norm: str
    outputs: Mapping[str, str]
    """Name of a state -> the module that returns it."""
    inputs: Mapping[str, str]
    """Name of a state -> the module that takes it."""
    own_attention: bool = False
    """Its attention cannot be exchanged for one that records: query, key and value are not compared."""


_DECODER_OUTPUTS = {
    at.ATTENTION_NORM: "input_layernorm",
    at.ATTENTION_OUTPUT: "self_attn",
    at.MLP_NORM: "post_attention_layernorm",
    at.UP: "mlp.up_proj",
    at.MLP_OUTPUT: "mlp",
    at.LAYER_OUTPUT: "",
}
_DECODER_INPUTS = {at.CONTEXT: "self_attn.o_proj", at.ACTIVATION: "mlp.down_proj"}

_EXPERT_LAYER_OUTPUTS = {
    name: module for name, module in _DECODER_OUTPUTS.items() if name not in (at.UP, at.MLP_OUTPUT)
}
"""The module of the experts has another name in transformers before 5 where the model is Mixtral."""

_DECODER = ("model.layers", "model.embed_tokens", "model.norm")
MODULES = {
    "llama": Modules(*_DECODER, {**_DECODER_OUTPUTS, at.GATE: "mlp.gate_proj"}, _DECODER_INPUTS),
    **dict.fromkeys(
        ("mistral", "qwen2", "qwen3"),
        Modules(*_DECODER, {**_DECODER_OUTPUTS, at.GATE: "mlp.gate_proj"}, _DECODER_INPUTS),
    ),
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe"),
        Modules(*_DECODER, _EXPERT_LAYER_OUTPUTS, {at.CONTEXT: "self_attn.o_proj"}),
    ),
    "nemotron": Modules(*_DECODER, _DECODER_OUTPUTS, _DECODER_INPUTS),
    "starcoder2": Modules(
        *_DECODER,
        {**_DECODER_OUTPUTS, at.UP: "mlp.c_fc"},
        {**_DECODER_INPUTS, at.ACTIVATION: "mlp.c_proj"},
    ),
    "gemma": Modules(
        "model.layers", None, "model.norm", {**_DECODER_OUTPUTS, at.GATE: "mlp.gate_proj"}, _DECODER_INPUTS
    ),
    "gemma2": Modules(
        "model.layers",
        None,
        "model.norm",
        {
            **_DECODER_OUTPUTS,
            at.GATE: "mlp.gate_proj",
            at.ATTENTION_OUTPUT: "post_attention_layernorm",
            at.MLP_NORM: "pre_feedforward_layernorm",
            at.MLP_OUTPUT: "post_feedforward_layernorm",
        },
        _DECODER_INPUTS,
    ),
    "falcon": Modules(
        "transformer.h",
        "transformer.word_embeddings",
        "transformer.ln_f",
        {
            at.ATTENTION_OUTPUT: "self_attention",
            at.UP: "mlp.dense_h_to_4h",
            at.MLP_OUTPUT: "mlp",
            at.LAYER_OUTPUT: "",
        },
        {at.CONTEXT: "self_attention.dense", at.ACTIVATION: "mlp.dense_4h_to_h"},
        own_attention=True,
    ),
    "gpt2": Modules(
        "transformer.h",
        "transformer.drop",
        "transformer.ln_f",
        {
            at.ATTENTION_NORM: "ln_1",
            at.ATTENTION_OUTPUT: "attn",
            at.MLP_NORM: "ln_2",
            at.UP: "mlp.c_fc",
            at.MLP_OUTPUT: "mlp",
            at.LAYER_OUTPUT: "",
        },
        {at.CONTEXT: "attn.c_proj", at.ACTIVATION: "mlp.c_proj"},
    ),
}
"""model_type -> its modules; of another type only the logits are compared."""


def run_huggingface(folder: Path, tokens: torch.Tensor, *, dtype: torch.dtype = torch.float32) -> Trace:
    """Run token ids [batch, position] through the model in `folder`, computing in `dtype`.

    No code from the folder is executed and nothing is downloaded. Raises `ExportError` when transformers is missing,
    cannot load the folder, or finds tensors missing, unexpected or of another shape.
    """
    model = _load(folder, dtype)
    trace = Trace()
    modules = MODULES.get(model.config.model_type)
    if modules is not None:
        _watch(model, modules, trace)
    with torch.inference_mode():
        trace.logits = model(input_ids=tokens, use_cache=False).logits.float()
    return trace


def load_decoded(folder: Path) -> Any:
    """The model in `folder` in float32, its quantised weights decoded; activations are not rounded.

    Raises `ExportError` as `run_huggingface` does.
    """
    return _load(folder, torch.float32, decoded=True)


def _load(folder: Path, dtype: torch.dtype, *, decoded: bool = False) -> Any:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ExportError(INSTALL_HINT) from error
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model_class, what = transformers.AutoModelForCausalLM, {_FOLDER: folder}
        if decoded and is_quantised(folder):
            model_class, what = _decoded(folder, transformers)
        model, info = model_class.from_pretrained(
            **what,
            torch_dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ExportError(f"{folder}: transformers {transformers.__version__} cannot load it: {error}") from error
    finally:
        transformers.logging.set_verbosity(level)
    faults = Faults(f"{folder}: not what {type(model).__name__} of transformers {transformers.__version__} expects")
    further = _further_layers(model.config)
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(map(str, info.get(f"{kind}_keys") or ()))
        faults.extend(f"{name} is {kind}" for name in names if not name.startswith(further))
    faults.raise_if_any()
    return model.eval()


_FOLDER = "pretrained_model_name_or_path"


def _decoded(folder: Path, transformers: Any) -> tuple[Any, dict[str, Any]]:
    """The model's class, its configuration as if it were not quantised, and its decoded weights."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    del config.quantization_config
    name = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ExportError(f"{folder}: transformers {transformers.__version__} has no {name}")
    return model_class, {_FOLDER: None, "config": config, "state_dict": decoded_state(folder)}


def _further_layers(config: Any) -> tuple[str, ...]:
    """Beginnings of names in layers that predict further tokens, which transformers leaves out."""
    first, count = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", None) or 0
    return tuple(f"model.layers.{first + number}." for number in range(count))


def _watch(model: Any, modules: Modules, trace: Trace) -> None:
    """Record hidden states as the modules compute them."""

    def output(point: Point, source: str) -> Callable[..., None]:
        def hook(_: object, __: object, result: Any) -> None:
            state = result[0] if isinstance(result, tuple) else result
            trace.record(point, state.clone(), source)  # some models add to it in place

        return hook

    def first_input(point: Point, source: str) -> Callable[..., None]:
        def hook(_: object, arguments: tuple[torch.Tensor, ...]) -> None:
            trace.record(point, arguments[0], source)

        return hook

    if modules.embedding is not None:
        model.get_submodule(modules.embedding).register_forward_hook(output(Point(at.EMBEDDING), modules.embedding))
    model.get_submodule(modules.final_norm).register_forward_hook(output(Point(at.FINAL_NORM), modules.final_norm))
    layers = model.get_submodule(modules.layers)
    for number, layer in enumerate(layers):
        path = f"{modules.layers}.{number}"
        for name, module in modules.outputs.items():
            point = Point(name, number)
            layer.get_submodule(module).register_forward_hook(output(point, f"{path}.{module}".removesuffix(".")))
        for name, module in modules.inputs.items():
            hook = first_input(Point(name, number), f"{path}, what goes into {module}")
            layer.get_submodule(module).register_forward_pre_hook(hook)
    if not modules.own_attention:
        _record_attention(model, modules, trace)


def _record_attention(model: Any, modules: Modules, trace: Trace) -> None:
    """Have the model attend through a function that records query, key and value and computes as before."""
    transformers: Any = importlib.import_module("transformers")
    sdpa: Any = importlib.import_module("transformers.integrations.sdpa_attention")
    masks: Any = importlib.import_module("transformers.masking_utils")
    forward, mask = sdpa.sdpa_attention_forward, masks.sdpa_mask
    if getattr(model.config, "attn_logit_softcapping", None) is not None:  # which sdpa cannot
        forward, mask = importlib.import_module(type(model).__module__).eager_attention_forward, masks.eager_mask
    numbers: dict[int, int] = {}
    for number, layer in enumerate(model.get_submodule(modules.layers)):
        numbers |= {id(module): number for module in layer.modules()}

    def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any) -> Any:
        number = numbers[id(module)]
        for name, state in ((at.QUERY, query), (at.KEY, key), (at.VALUE, value)):
            source = f"{modules.layers}.{number}, {name} projection"
            trace.record(Point(name, number), state.transpose(1, 2), source)
        return forward(module, query, key, value, *args, **kw)

    transformers.AttentionInterface.register(_ATTENTION, attend)
    transformers.AttentionMaskInterface.register(_ATTENTION, mask)
    model.set_attn_implementation(_ATTENTION)
