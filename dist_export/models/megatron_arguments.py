"""Megatron's saved training arguments -> claims about `ModelConfig` fields.

The arguments are the argparse Namespace that every Megatron-LM release saves, as a plain mapping. Names
changed between releases and an absent name means a release without it, so each rule lists every name an
argument had and Megatron's default (megatron/training/arguments.py, `core_transformer_config_from_args`,
releases core_v0.4.0 to 0.19). Names of `TransformerConfig` are listed too where they differ: run
configurations of other trainers use them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from msgspec import Struct

from dist_export.errors import Faults
from dist_export.models.config import RopeScaling
from dist_export.models.provenance import Claim, derived, from_arguments, from_default

_LARGEST = sys.float_info.max  # a saved integer can be larger than any float


class Arguments:
    """Typed access to a saved Namespace. A value of the wrong type becomes a fault and reads as absent."""

    def __init__(self, values: Mapping[str, object], faults: Faults) -> None:
        self.values = values
        self.faults = faults

    def has(self, name: str) -> bool:
        """Whether the release that saved the arguments knew `name`, whatever its value."""
        return name in self.values

    def integer(self, name: str) -> int | None:
        """The value as int, or None; integral floats are accepted, booleans are not."""
        value = self.values.get(name)
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return int(value)
        if value is not None:
            self._fault(name, "an integer")
        return None

    def number(self, name: str) -> float | None:
        """The value as a finite float, or None."""
        value = self.values.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST:
            return float(value)
        if value is not None:
            self._fault(name, "a number")
        return None

    def boolean(self, name: str) -> bool | None:
        """The value as bool, or None; 0 and 1 are accepted."""
        value = self.values.get(name)
        if value in (True, False) and isinstance(value, int):
            return bool(value)
        if value is not None:
            self._fault(name, "true or false")
        return None

    def switch(self, name: str, default: bool = False) -> bool:
        """The value as bool; absent and None read as `default`."""
        value = self.boolean(name)
        return default if value is None else value

    def word(self, name: str) -> str | None:
        """The value as str, or None."""
        value = self.values.get(name)
        if isinstance(value, str):
            return str.__str__(value)  # of a member of a str enumeration too
        if value is not None:
            self._fault(name, "a word")
        return None

    def integers(self, name: str) -> tuple[int, ...] | None:
        """The value as a tuple of ints, or None."""
        value = self.values.get(name)
        if isinstance(value, list | tuple) and all(type(item) is int for item in value):
            return tuple(value)
        if value is not None:
            self._fault(name, "a list of integers")
        return None

    def typed(self, name: str, kind: type) -> object:
        """The value as `kind` (int, float, bool or str), or None."""
        readers = {int: self.integer, float: self.number, bool: self.boolean, str: self.word}
        return readers[kind](name)

    def _fault(self, name: str, expected: str) -> None:
        value = self.values[name]
        self.faults.add(
            f"checkpoint args: {name} is {value!r:.80} ({type(value).__name__}), expected {expected}; "
            "give the field it decides with --set field=value"
        )


#: Which arguments to read a field from: overridden fields are read without raising faults.
ReaderFor = Callable[[str], Arguments]


class ArgumentRule(Struct, frozen=True):
    """A field that is one argument, under any of `names`; `inverse` names hold its negation."""

    field: str
    kind: type
    names: tuple[str, ...]
    inverse: tuple[str, ...] = ()
    default: object = None  # Megatron's; None where it has none


#: Fields that need no computation. First the names in use today, then those of older releases.
RULES: tuple[ArgumentRule, ...] = (
    ArgumentRule("num_layers", int, ("num_layers",)),
    ArgumentRule("hidden_size", int, ("hidden_size",)),
    ArgumentRule("num_attention_heads", int, ("num_attention_heads",)),
    ArgumentRule("head_size", int, ("kv_channels",)),
    ArgumentRule("normalization", str, ("normalization",), default="LayerNorm"),
    # layernorm_epsilon: until 23.04 and from 0.16; norm_epsilon: 0.4 to 0.15. No release lacks both, so no default.
    ArgumentRule("norm_epsilon", float, ("layernorm_epsilon", "norm_epsilon")),
    # apply_layernorm_1p until 0.15.
    ArgumentRule("zero_centered_norm", bool, ("layernorm_zero_centered_gamma", "apply_layernorm_1p"), default=False),
    # disable_bias_linear: branches that NVIDIA's foundation models were trained with.
    ArgumentRule("linear_bias", bool, ("add_bias_linear",), inverse=("disable_bias_linear",), default=True),
    ArgumentRule("rotary_base", float, ("rotary_base",), default=10000.0),  # fixed before 0.8
    ArgumentRule("rotary_percent", float, ("rotary_percent",), default=1.0),
    ArgumentRule("rotary_interleaved", bool, ("rotary_interleaved",), default=False),
    ArgumentRule("max_position_embeddings", int, ("max_position_embeddings",)),
    ArgumentRule(
        "tied_embeddings",
        bool,
        ("share_embeddings_and_output_weights",),
        inverse=("untie_embeddings_and_output_weights",),
        default=True,
    ),
    ArgumentRule("padded_vocab_size", int, ("padded_vocab_size",)),
    ArgumentRule("qk_norm", bool, ("qk_layernorm",), default=False),
    ArgumentRule("num_experts", int, ("num_experts", "num_moe_experts"), default=0),
    ArgumentRule("moe_top_k", int, ("moe_router_topk",), default=2),
    ArgumentRule("moe_shared_expert_ffn_hidden_size", int, ("moe_shared_expert_intermediate_size",), default=0),
    ArgumentRule("moe_shared_expert_gate", bool, ("moe_shared_expert_gate",), default=False),
    ArgumentRule("moe_router_pre_softmax", bool, ("moe_router_pre_softmax",), default=False),
    ArgumentRule("moe_router_score_function", str, ("moe_router_score_function",), default="softmax"),
    ArgumentRule("moe_router_expert_bias", bool, ("moe_router_enable_expert_bias",), default=False),
    ArgumentRule("moe_router_num_groups", int, ("moe_router_num_groups",)),
    ArgumentRule("moe_router_group_top_k", int, ("moe_router_group_topk",)),
    ArgumentRule("moe_router_scaling_factor", float, ("moe_router_topk_scaling_factor",)),
    ArgumentRule("attention_output_gate", bool, ("attention_output_gate",), default=False),
    ArgumentRule("num_mtp_layers", int, ("mtp_num_layers",), default=0),
    ArgumentRule("glu_offset", float, ("glu_linear_offset",), default=0.0),
    ArgumentRule("activation_clamp", float, ("activation_func_clamp_value",)),
)

#: Fields whose argument is None on purpose: no experts, no shared expert, no router groups, no scaling.
_NONE_IS_A_VALUE = frozenset(
    {
        "num_experts",
        "moe_shared_expert_ffn_hidden_size",
        "moe_router_num_groups",
        "moe_router_group_top_k",
        "moe_router_scaling_factor",
        "num_mtp_layers",
        "activation_clamp",
    }
)


_GLU_INTERLEAVE = ("moe_glu_interleave_size", "moe_glu_interleave_num_shards")


def simple_claims(reader_for: ReaderFor) -> dict[str, Claim]:
    """Claims of every rule in `RULES`. Two names of one argument that disagree are a fault."""
    claims: dict[str, Claim] = {}
    for rule in RULES:
        arguments = reader_for(rule.field)
        found = _values(rule, arguments)
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{name} = {value}" for name, value in found.items())
            arguments.faults.add(f"{rule.field}: the checkpoint args contradict each other: {listed}")
        elif found:
            claims[rule.field] = Claim(next(iter(found.values())), from_arguments(*found))
        else:
            claims |= _default_claim(rule, arguments)
    return claims


def _values(rule: ArgumentRule, arguments: Arguments) -> dict[str, object]:
    found = {name: arguments.typed(name, rule.kind) for name in rule.names}
    for name in rule.inverse:
        value = arguments.typed(name, bool)
        found[name] = None if value is None else not value
    return {name: value for name, value in found.items() if value is not None}


def _default_claim(rule: ArgumentRule, arguments: Arguments) -> dict[str, Claim]:
    """The claim of an argument that is absent, or saved as None where None has a meaning; else nothing."""
    present = [name for name in (*rule.names, *rule.inverse) if arguments.has(name)]
    if rule.field in _NONE_IS_A_VALUE and present:
        return {rule.field: Claim(rule.default, from_arguments(*present))}
    if present or (rule.default is None and rule.field not in _NONE_IS_A_VALUE):
        return {}
    absent = (rule.names or rule.inverse)[0]
    return {rule.field: Claim(rule.default, from_default(absent), default=True)}


#: Names of Llama-3.1 scaling: of the switch, of its factor, of linear interpolation. Megatron-LM's arguments, then
#: the parameters of GPTModel, which the configurations of other trainers have.
_ROPE_SCALING_NAMES = (
    ("use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor"),
    ("rope_scaling", "rope_scaling_factor", "seq_len_interpolation_factor"),
)
_LLAMA3_NUMBERS = {
    "low_freq_factor": ("rope_scaling_low_freq_factor", 1.0),
    "high_freq_factor": ("rope_scaling_high_freq_factor", 4.0),
    "original_max_position_embeddings": ("rope_scaling_original_max_position_embeddings", 8192),
}
"""Constants in Megatron's code; fields of the models of other trainers that have their own."""


def rope_scaling_claim(arguments: Arguments) -> Claim:
    """`rope_scaling` from Llama-3.1 scaling (0.10; its factor 0.11, 8 before) or linear interpolation."""
    names = next((names for names in _ROPE_SCALING_NAMES if arguments.switch(names[0])), None)
    linear = next((names[2] for names in _ROPE_SCALING_NAMES if arguments.number(names[2]) is not None), None)
    interpolation = arguments.number(linear) if linear else None
    if names is not None:
        if interpolation not in (None, 1.0):
            arguments.faults.add(f"rope_scaling: the checkpoint args have both {names[0]} and {linear}, no target has")
        return _llama3_claim(arguments, names[0], names[1])
    if linear is not None and interpolation is not None:
        return Claim(RopeScaling("linear", interpolation), from_arguments(linear))
    known = next((names[0] for names in _ROPE_SCALING_NAMES if arguments.has(names[0])), None)
    if known is not None:
        return Claim(None, from_arguments(known))
    return Claim(None, from_default("use_rope_scaling"), default=True)


def _llama3_claim(arguments: Arguments, switch: str, factor_name: str) -> Claim:
    factor = arguments.number(factor_name)
    names = [switch] if factor is None else [switch, factor_name]
    numbers = dict.fromkeys(_LLAMA3_NUMBERS, 0.0)
    for field, (name, default) in _LLAMA3_NUMBERS.items():
        given = arguments.number(name)
        numbers[field] = default if given is None else given
        names += [] if given is None else [name]
    scaling = RopeScaling(
        "llama3",
        8.0 if factor is None else factor,
        low_freq_factor=numbers["low_freq_factor"],
        high_freq_factor=numbers["high_freq_factor"],
        original_max_position_embeddings=int(numbers["original_max_position_embeddings"]),
    )
    return Claim(scaling, from_arguments(*names))


def position_embedding_claim(arguments: Arguments) -> Claim:
    """`position_embedding`. `add_position_embedding` is true by default even with rope, so it says nothing;
    the deprecated `use_rotary_position_embeddings` outranks the type, as in `validate_args`."""
    if arguments.switch("use_rotary_position_embeddings"):
        return Claim("rope", from_arguments("use_rotary_position_embeddings"))
    kind = arguments.word("position_embedding_type")
    if kind is None:
        return Claim("learned_absolute", from_default("position_embedding_type"), default=True)
    return Claim("rope" if kind == "yarn" else kind, from_arguments("position_embedding_type"))


def rope_scaling_notes(arguments: Arguments, scaling: object) -> list[str]:
    """What the user should know about a scaling from the arguments that some of Megatron's entry points ignore.

    No release of `pretrain_gpt` passes `rope_scaling_factor` to the model (which then uses 8), and before
    0.18 none passes `rotary_seq_len_interpolation_factor` to a Megatron-Core model; converters and servers do.
    """
    if not isinstance(scaling, RopeScaling) or scaling.kind == "yarn" or arguments.has("rope_scaling"):
        return []
    if scaling.kind == "linear" and not arguments.has("rotary_seq_len_interpolation_factor"):
        return []
    if scaling.kind == "linear":
        return [
            f"rope_scaling: the factor {scaling.factor:g} of rotary_seq_len_interpolation_factor is exported, but "
            "Megatron-LM's pretrain_gpt ignored that argument before 0.18: if this model was trained so, give "
            "--set rope_scaling=none"
        ]
    if scaling.factor != 8.0:
        return [
            f"rope_scaling: the factor {scaling.factor:g} of rope_scaling_factor is exported, but Megatron-LM's "
            "pretrain_gpt ignores that argument and computes with 8: if this model was trained so, give "
            "--set rope_scaling=llama3:8"
        ]
    return []


def window_claim(arguments: Arguments) -> Claim:
    """`window_size` from the pair (left, right) of tokens seen on each side; -1 is unlimited.

    Right is 0 or -1 in a causal model (the causal mask hides what lies to the right).
    """
    window = arguments.integers("window_size")
    if window is None:
        if arguments.has("window_size"):
            return Claim(None, from_arguments("window_size"))
        return Claim(None, from_default("window_size"), default=True)
    if len(window) != 2 or window[1] not in (0, -1):
        arguments.faults.add(f"checkpoint args: window_size {window} is not (left, 0) or (left, -1) of a causal model")
        return Claim(None, from_arguments("window_size"))
    return Claim(None if window[0] < 0 else window[0], from_arguments("window_size"))


def moe_layer_claim(arguments: Arguments, num_layers: int | None) -> Claim:
    """`moe_layer_freq`: an int N marks layers 0, N, 2N … as MoE, a list marks them one by one
    (gpt_layer_specs.py, `get_gpt_decoder_block_spec`). Layers that are all MoE give None."""
    if not arguments.has("moe_layer_freq"):
        return Claim(None, from_default("moe_layer_freq"), default=True)
    source = from_arguments("moe_layer_freq")
    value = arguments.values["moe_layer_freq"]
    if isinstance(value, list | tuple):
        layers = arguments.integers("moe_layer_freq")
    else:
        every = arguments.integer("moe_layer_freq") or 1
        layers = tuple(int(layer % every == 0) for layer in range(num_layers or 0))
    return Claim(None if layers is None or all(layers) else layers, source)


def glu_interleave_claims(arguments: Arguments) -> dict[str, Claim]:
    """Whether gate and up rows of experts alternate (0.18): only where they are grouped (transformer/moe/experts.py,
    `TEGroupedMLP`; `SequentialMLP` ignores the argument), and on each expert-tp rank among the rows it has."""
    name, ranks = "moe_mlp_glu_interleave_size", "expert_tensor_parallel_size"
    size, grouped = arguments.integer(name), arguments.switch("moe_grouped_gemm")
    if size is None or (arguments.has("moe_grouped_gemm") and not grouped):
        source = from_arguments(name, "moe_grouped_gemm") if size is not None else f"experts without {name}"
        return dict(zip(_GLU_INTERLEAVE, (Claim(0, source), Claim(1, source)), strict=True))
    shards = arguments.integer(ranks)
    by = Claim(shards, from_arguments(ranks)) if shards else Claim(1, from_default(ranks), default=True)
    return dict(zip(_GLU_INTERLEAVE, (Claim(size, from_arguments(name)), by), strict=True))


def sink_claim(arguments: Arguments) -> Claim:
    """`attention_sinks` (0.15); the softmax that is off by one is refused elsewhere."""
    kind = arguments.word("softmax_type")
    if kind is None:
        return Claim(False, from_default("softmax_type"), default=True)
    return Claim(kind == "learnable", from_arguments("softmax_type"))


def query_group_claim(arguments: Arguments, heads: int | None) -> Claim | None:
    """`num_query_groups`, which means nothing unless `group_query_attention` is set: then groups = heads.

    A mapping without that switch is older than grouped queries, or a `TransformerConfig`, where the number
    alone decides.
    """
    groups = arguments.integer("num_query_groups")
    if arguments.has("group_query_attention"):
        if arguments.switch("group_query_attention"):
            source = from_arguments("group_query_attention", "num_query_groups")
            return None if groups is None else Claim(groups, source)
        return None if heads is None else Claim(heads, from_arguments("group_query_attention"))
    if groups is not None:
        return Claim(groups, from_arguments("num_query_groups"))
    return None if heads is None else Claim(heads, derived("num_attention_heads"), default=True)
