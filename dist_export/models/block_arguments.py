"""What saved arguments say about uncommon layers: windows in some of them, capped scores, parallel attention."""

from __future__ import annotations

from dist_export.models.megatron_arguments import Arguments, ReaderFor
from dist_export.models.provenance import Claim, from_arguments, from_default

_NOT_THERE = "Megatron-LM has no such argument; NeMo and Megatron-Bridge do"


def block_claims(reader_for: ReaderFor, window: Claim, num_layers: int) -> dict[str, Claim]:
    """Claims for `window_layers`, and for what Gemma and Falcon have in NeMo and Megatron-Bridge."""
    claims = {
        "window_layers": _window_layers_claim(reader_for("window_layers"), window, num_layers),
        **_parallel_claims(reader_for("parallel_attention")),
    }
    for name in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
        claims[name] = _claim(name, reader_for(name).number(name) or None, reader_for(name))
    scaling, name = reader_for("embedding_scaling"), "apply_embedding_scaling"
    claims["embedding_scaling"] = _claim(name, scaling.switch(name), scaling)
    return claims


def _claim(name: str, value: object, arguments: Arguments) -> Claim:
    present = arguments.has(name)
    return Claim(value, from_arguments(name) if present else _NOT_THERE, default=not present)


def window_notes(arguments: Arguments, layers: object) -> list[str]:
    """Trainers of Gemma 2 gave the window to the other layers for long: it only matters beyond the window."""
    if layers is None or arguments.values.get("window_attn_skip_freq") is not None:
        return []
    return [
        "window_layers: the window is taken to be in the first, third, ... layer, as Gemma 2 was made; NeMo, and "
        "Megatron-Bridge before 0.6, had it in the others: if this model was trained so on sequences longer than the "
        "window, give --set window_layers=0,1,0,1,..."
    ]


def parallel_notes(parallel: object, linear_bias: object) -> list[str]:
    """What NeMo's Falcon does with biases that other implementations add."""
    if not (parallel and linear_bias):
        return []
    return [
        "parallel_attention: the biases of linear_proj and linear_fc2 are exported and every consumer adds them; "
        "NeMo's own parallel layers leave them out, so a model trained there is only equal where they are zero"
    ]


def _window_layers_claim(arguments: Arguments, window: Claim, num_layers: int) -> Claim:
    """`window_attn_skip_freq` N leaves every N-th layer without a window, a list names those with one
    (transformer/utils.py, `is_layer_window_attention`). In Gemma 2, which has no argument for it, every second layer
    sees all, beginning with the second (megatron/bridge/models/gemma/gemma2_provider.py)."""
    if window.value is None:
        return Claim(None, window.source, default=window.default)
    name = "window_attn_skip_freq"
    value = arguments.values.get(name)
    if isinstance(value, list | tuple):
        given = [int(bool(each)) for each in value]
    elif value is not None:
        every = arguments.integer(name) or 1
        given = [int(number % every != 0) for number in range(1, num_layers + 1)]
    elif arguments.number("attn_logit_softcapping"):
        name = "attn_logit_softcapping"
        given = [int(number % 2 != 0) for number in range(1, num_layers + 1)]
    else:
        return Claim(None, from_default(name), default=True)
    return Claim(None if all(given) else tuple(given), from_arguments(name))


def _parallel_claims(arguments: Arguments) -> dict[str, Claim]:
    """NeMo's Falcon (nlp/models/language_modeling/megatron/falcon/falcon_decoder_layer.py): its new decoder is
    parallel whatever the other switch says, and has a norm for each of attention and MLP."""
    names = [name for name in ("parallel_attention", "new_decoder_architecture") if arguments.has(name)]
    parallel, separate = (arguments.switch(name) for name in ("parallel_attention", "new_decoder_architecture"))
    source = from_arguments(*names) if names else _NOT_THERE
    return {
        "parallel_attention": Claim(parallel or separate, source, default=not names),
        "separate_mlp_norm": Claim(separate or not parallel, source, default=not names),
    }
