"""The one place where a model configuration is decided: overrides, saved arguments, tensor shapes, defaults.

Precedence is in that order, and sources that contradict each other stop the run: all contradictions, all
refused features and all fields that nothing proves come in one error. Two exceptions: the embedding's rows
beat the saved `padded_vocab_size` (a checkpoint saved again on another tp carries other padding), and an
override replaces an argument, which is noted.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

from msgspec.structs import fields

from dist_export.errors import ExportError, Faults
from dist_export.models import attention, heterogeneous, latent_attention, megatron_arguments, yarn
from dist_export.models.activation_arguments import (
    activation_claims,
    activation_notes,
    ffn_claim,
    moe_ffn_claim,
    qkv_bias_claim,
)
from dist_export.models.block_arguments import block_claims, parallel_notes, window_notes
from dist_export.models.config import ModelConfig
from dist_export.models.megatron_arguments import Arguments
from dist_export.models.overrides import (
    FIELDS,
    check_field,
    coerce_override,
    overrides_from_file,
    parse_override,
)
from dist_export.models.provenance import Claim, ResolvedConfig
from dist_export.models.refusals import refused_arguments
from dist_export.models.tensor_evidence import (
    DENSE_MLP,
    POSITION_EMBEDDING,
    Shapes,
    checked_shapes,
    claims_from_shapes,
)
from dist_export.models.vocabulary import vocabulary_claim

__all__ = ["overrides_from_file", "parse_override", "resolve_config"]

#: Fields where the tensors beat the saved arguments without an error.
_SHAPES_WIN = frozenset({"padded_vocab_size"})
#: Fields of a mixture of experts; a dense model has the class's defaults whatever its arguments say.
_MOE_FIELDS = tuple(field for field in FIELDS if field.startswith("moe_"))
#: Fields that change the function and leave no trace in shapes: without arguments the user must give them.
_UNPROVEN = ("norm_epsilon", "activation", "zero_centered_norm", "position_embedding", "max_position_embeddings")
_UNPROVEN_ROTARY = ("rotary_base", "rotary_percent", "rope_scaling")
_UNPROVEN_MOE = ("moe_top_k", "moe_router_pre_softmax", "moe_router_score_function")


def resolve_config(
    *,
    arguments: Mapping[str, object] | None,
    shapes: Shapes,
    num_layers_found: int,
    overrides: Mapping[str, tuple[object, str]] | None = None,
) -> ResolvedConfig:
    """Decide every field of `ModelConfig` and remember where it came from. Pure: reads nothing, any rank.

    Args:
        arguments: the saved Namespace as a mapping (values None, bool, int, float, str, lists of these, or
            inert records, which are only looked at when a field needs them); None if the checkpoint has none.
        shapes: folded tensor name -> shape of one layer, see `tensor_evidence`.
        num_layers_found: decoder layers in the checkpoint.
        overrides: field -> (value, where it came from), see `overrides`.

    Raises:
        ExportError: refused features, contradictions, unproven fields, an impossible configuration.
    """
    faults = Faults("model configuration")
    given = _override_claims(overrides or {})
    shapes = checked_shapes(shapes, faults)
    proven = claims_from_shapes(shapes, num_layers_found, faults) | latent_attention.shape_claims(shapes)
    reader = Arguments(arguments, faults) if arguments else None
    claims = _argument_claims(reader, given, proven) if reader else {}
    notes: list[str] = []
    chosen = _choose_all(given, claims, proven, faults, notes)
    _complete_attention(chosen, shapes, faults)
    _settle(chosen, given, shapes, faults)
    _settle_vocabulary(chosen, reader, notes)
    if reader is not None:
        notes.extend(_argument_notes(reader, given, chosen))
    _add_missing(chosen, reader, shapes, faults, notes)
    faults.raise_if_any()
    return _build(chosen, notes)


def _complete_attention(chosen: dict[str, Claim], shapes: Shapes, faults: Faults) -> None:
    """Heads and their sizes, which shapes and one another decide."""
    latent = chosen.get("kv_lora_rank")
    if latent is not None and latent.value:
        latent_attention.complete(chosen, shapes, faults)
    else:
        attention.complete(chosen, shapes, faults)


def _override_claims(overrides: Mapping[str, tuple[object, str]]) -> dict[str, Claim]:
    faults = Faults("model configuration")
    claims: dict[str, Claim] = {}
    for field, (value, source) in overrides.items():
        try:
            check_field(field)
            claims[field] = Claim(coerce_override(field, value), source)
        except ExportError as error:
            faults.add(f"{source}: {error}")
    faults.raise_if_any()
    return claims


def _argument_claims(reader: Arguments, given: Mapping[str, Claim], proven: Mapping[str, Claim]) -> dict[str, Claim]:
    """Claims of the saved arguments; refused features and unusable values are faults of `reader`.

    Overrides feed the computed fields, so that an overridden `linear_bias` decides `qkv_bias` as the
    argument would have. An argument whose field is overridden may hold anything.
    """
    reader.faults.extend(refused_arguments(reader.values))
    unheard = Arguments(reader.values, Faults("overridden"))

    def reader_for(field: str) -> Arguments:
        return unheard if field in given else reader

    claims = megatron_arguments.simple_claims(reader_for) | latent_attention.argument_claims(reader_for)
    if "num_layers" not in claims and "num_layers" not in given:
        reader.faults.add("checkpoint args: num_layers is not set, as in hybrid models, which have no rule table")

    def known(field: str) -> Claim | None:
        """What will win, as far as can be said now: only defaults give way to shapes."""
        claim = given.get(field) or claims.get(field)
        return proven.get(field, claim) if claim is None or claim.default else claim

    def number(field: str) -> int | None:
        claim = known(field)
        return claim.value if claim and isinstance(claim.value, int) else None

    bias = known("linear_bias")
    claims |= activation_claims(reader_for("activation"), bool(bias and bias.value))
    layers = proven.get("num_layers")  # never the argument: a list of that many entries is made
    num_layers = layers.value if layers and isinstance(layers.value, int) else 0
    computed = {
        "position_embedding": megatron_arguments.position_embedding_claim(reader_for("position_embedding")),
        "rope_scaling": _rope_scaling_claim(reader_for("rope_scaling")),
        "qkv_bias": qkv_bias_claim(reader_for("qkv_bias"), bias),
        "ffn_hidden_size": ffn_claim(reader_for("ffn_hidden_size"), number("hidden_size")),
        "num_query_groups": megatron_arguments.query_group_claim(
            reader_for("num_query_groups"), number("num_attention_heads")
        ),
        "moe_layer_freq": megatron_arguments.moe_layer_claim(reader_for("moe_layer_freq"), num_layers),
        "window_size": megatron_arguments.window_claim(reader_for("window_size")),
        "attention_sinks": megatron_arguments.sink_claim(reader_for("attention_sinks")),
    }
    claims |= {field: claim for field, claim in computed.items() if claim is not None}
    claims |= block_claims(reader_for, given.get("window_size") or claims["window_size"], num_layers)
    claims |= megatron_arguments.glu_interleave_claims(reader_for("moe_glu_interleave_size"))
    if latent_attention.is_latent(reader):  # these two mean nothing there
        claims = {field: claim for field, claim in claims.items() if field not in ("head_size", "num_query_groups")}
    claims["blocks"] = heterogeneous.block_list_claim(
        reader_for("blocks"), heads=number("num_attention_heads"), hidden=number("hidden_size")
    )
    claims |= heterogeneous.first_sizes(given.get("blocks") or claims["blocks"])
    moe_ffn = moe_ffn_claim(reader_for("moe_ffn_hidden_size"), known("ffn_hidden_size"))
    return claims if moe_ffn is None else claims | {"moe_ffn_hidden_size": moe_ffn}


def _rope_scaling_claim(arguments: Arguments) -> Claim:
    if latent_attention.is_latent(arguments):
        return yarn.latent_claim(arguments)
    if arguments.values.get("position_embedding_type") == "yarn":
        return yarn.position_claim(arguments)
    return megatron_arguments.rope_scaling_claim(arguments)


def _choose_all(
    given: Mapping[str, Claim],
    claims: Mapping[str, Claim],
    proven: Mapping[str, Claim],
    faults: Faults,
    notes: list[str],
) -> dict[str, Claim]:
    chosen: dict[str, Claim] = {}
    for field in FIELDS:
        override, claim, proof = given.get(field), claims.get(field), proven.get(field)
        winner: Claim | None
        if override is not None:
            winner = override
            _check_override(field, override, claim, proof, faults, notes)
        else:
            winner = _choose(field, claim, proof, faults, notes)
        if winner is not None:
            chosen[field] = winner
    return chosen


def _check_override(
    field: str, override: Claim, claim: Claim | None, proof: Claim | None, faults: Faults, notes: list[str]
) -> None:
    if proof is not None and proof.value != override.value:
        faults.add(
            f"{field}: {override.source} says {_text(override.value)}, {proof} proves {_text(proof.value)}; "
            "correct or drop the override"
        )
    elif claim is not None and not claim.default and claim.value != override.value:
        notes.append(
            f"{field}: {_text(override.value)} ({override.source}) replaces {_text(claim.value)} ({claim.source})"
        )


def _choose(field: str, claim: Claim | None, proof: Claim | None, faults: Faults, notes: list[str]) -> Claim | None:
    """The argument, unless it is a default or the tensors win; a contradiction is a fault."""
    if claim is None or proof is None:
        return claim or proof
    if claim.default:
        return proof
    if claim.value == proof.value:
        return claim
    if field in _SHAPES_WIN:
        notes.append(
            f"{field}: {_text(proof.value)} of {proof} is used, not {_text(claim.value)} of {claim.source}: "
            "the checkpoint was saved again with other padding"
        )
        return proof
    faults.add(
        f"{field}: {claim.source} says {_text(claim.value)}, {proof} proves {_text(proof.value)}; "
        f"if the tensors are right, give --set {field}={_text(proof.value)}"
    )
    return claim


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _settle(chosen: dict[str, Claim], given: Mapping[str, Claim], shapes: Shapes, faults: Faults) -> None:
    """Fields that follow from chosen ones: of dense models, of experts only, of positions."""
    experts = chosen.get("num_experts")
    if experts is not None and experts.value == 0:
        for field in _MOE_FIELDS:
            if field not in given:
                chosen[field] = Claim(_default(field), f"dense model ({experts.source})")
    elif "ffn_hidden_size" not in chosen and "moe_ffn_hidden_size" in chosen:
        expert_ffn = chosen["moe_ffn_hidden_size"]
        chosen["ffn_hidden_size"] = Claim(expert_ffn.value, f"moe_ffn_hidden_size ({expert_ffn.source})")
    position = chosen.get("position_embedding")
    if position is not None:
        _settle_position(chosen, position, given, shapes, faults)
    if "attention_output_gate" in given and given["attention_output_gate"].value:
        faults.add(f"attention_output_gate ({given['attention_output_gate'].source}): no target computes it")


def _settle_vocabulary(chosen: dict[str, Claim], reader: Arguments | None, notes: list[str]) -> None:
    padded = chosen.get("padded_vocab_size")
    if "vocab_size" in chosen or padded is None:
        return
    chosen["vocab_size"], about = vocabulary_claim(reader, padded)
    notes.extend(about)


def _argument_notes(reader: Arguments, given: Mapping[str, Claim], chosen: Mapping[str, Claim]) -> list[str]:
    notes: list[str] = []
    if "rope_scaling" not in given and "rope_scaling" in chosen:
        notes += megatron_arguments.rope_scaling_notes(reader, chosen["rope_scaling"].value)
    if "activation" not in given and "activation" in chosen:
        notes += activation_notes(reader, chosen["activation"].value)
    if "window_layers" not in given and "window_layers" in chosen:
        notes += window_notes(reader, chosen["window_layers"].value)
    if "parallel_attention" in chosen and "linear_bias" in chosen:
        notes += parallel_notes(chosen["parallel_attention"].value, chosen["linear_bias"].value)
    return notes


def _settle_position(
    chosen: dict[str, Claim], position: Claim, given: Mapping[str, Claim], shapes: Shapes, faults: Faults
) -> None:
    if position.value == "learned_absolute" and shapes and POSITION_EMBEDDING not in shapes:
        faults.add(
            f"position_embedding: {position.source} says learned_absolute, but there is no tensor "
            f"{POSITION_EMBEDDING}; if positions are rotary, give --set position_embedding=rope"
        )
    if position.value == "rope":
        return
    if "rope_scaling" not in given:
        chosen["rope_scaling"] = Claim(None, f"position_embedding is {position.value} ({position.source})")


_fields = cache(fields)


def _default(field: str) -> object:
    return next(item.default for item in _fields(ModelConfig) if item.name == field)


def _add_missing(
    chosen: dict[str, Claim], reader: Arguments | None, shapes: Shapes, faults: Faults, notes: list[str]
) -> None:
    """Give fields that are still open Megatron's default where that is safe; the others are one fault."""
    required = {item.name for item in _fields(ModelConfig) if item.required}
    if reader is None:
        required |= _needed_without_arguments(chosen, shapes)
    missing = [field for field in FIELDS if field in required and field not in chosen]
    if attention.HEADS in missing:  # one of the three proves the others
        missing = [field for field in missing if field not in (attention.GROUPS, attention.SIZE)]
    if missing:
        holder = "the checkpoint holds no training arguments" if reader is None else "the checkpoint args do not say"
        faults.add(
            f"{holder} and the tensor shapes do not prove {', '.join(missing)}: "
            "give each with --set field=value, or all in a YAML or JSON file with --config FILE"
        )
    assumed = [field for field in FIELDS if field not in chosen and field not in required]
    for field in assumed:
        chosen[field] = Claim(_default(field), "Megatron default (not in the checkpoint)", default=True)
    if assumed and reader is None:
        values = ", ".join(f"{field}={_text(chosen[field].value)}" for field in assumed)
        notes.append(f"Not proven by the checkpoint, so taken as Megatron's defaults: {values}")


def _needed_without_arguments(chosen: Mapping[str, Claim], shapes: Shapes) -> set[str]:
    needed = set(_UNPROVEN)
    position = chosen.get("position_embedding")
    if position is None or position.value == "rope":
        needed |= set(_UNPROVEN_ROTARY)
    experts = chosen.get("num_experts")
    if experts is not None and experts.value:
        needed |= set(_UNPROVEN_MOE)
        if DENSE_MLP + "linear_fc2.weight" in shapes:
            needed.add("moe_layer_freq")
    return needed


def _build(chosen: Mapping[str, Claim], notes: list[str]) -> ResolvedConfig:
    values = typing.cast(dict[str, Any], {field: chosen[field].value for field in FIELDS})
    try:
        config = ModelConfig(**values)
    except ExportError as error:
        sources = ", ".join(f"{field} ({chosen[field].source})" for field in FIELDS if field in str(error))
        raise ExportError(f"{error}\nThese values come from: {sources}") from None
    return ResolvedConfig(config, {field: chosen[field].source for field in FIELDS}, tuple(notes))
