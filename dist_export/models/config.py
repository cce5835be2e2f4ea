"""What a model is: the fields that decide its tensors' shapes and the function they compute.

A `ModelConfig` is the same whatever checkpoint, release or target it came from or goes to. It holds values
only; where each value came from is kept beside it (`provenance.ResolvedConfig`). Which fields a target can
express is the target's business: only combinations that no model can have are refused here.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, get_args

from msgspec import Struct
from msgspec.structs import replace

from dist_export.errors import ExportError, Faults
from dist_export.models.blocks import Blocks

Activation = Literal["gelu", "gelu_tanh", "relu", "squared_relu", "silu", "quick_gelu"]
Normalization = Literal["LayerNorm", "RMSNorm"]
PositionEmbedding = Literal["learned_absolute", "rope", "none"]
RopeScalingKind = Literal["linear", "llama3", "yarn"]
RouterScoreFunction = Literal["softmax", "sigmoid"]

ACTIVATIONS: tuple[str, ...] = get_args(Activation)
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)
POSITION_EMBEDDINGS: tuple[str, ...] = get_args(PositionEmbedding)
ROPE_SCALING_KINDS: tuple[str, ...] = get_args(RopeScalingKind)
ROUTER_SCORE_FUNCTIONS: tuple[str, ...] = get_args(RouterScoreFunction)


class RopeScaling(Struct, frozen=True):
    """How rotary frequencies are stretched for long sequences.

    `linear` divides positions by `factor` and ignores the rest. `llama3` is the piecewise scaling of
    Llama 3.1; Megatron keeps its last three numbers as constants in code (rotary_pos_embedding.py,
    `_apply_scaling`), which are the defaults here. `yarn` blends both by wavelength between `beta_fast` and `beta_slow`
    rotations and scales the rotated values by mscale's ratio (yarn_rotary_pos_embedding.py).

    Raises:
        ExportError: unknown kind, or numbers that describe no scaling.
    """

    kind: RopeScalingKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192  # tokens
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    truncate: bool = True  # the borders of yarn's blend are whole dims

    def __post_init__(self) -> None:
        if self.kind not in ROPE_SCALING_KINDS:
            raise ExportError(f"rope_scaling: kind {self.kind!r} is none of {', '.join(ROPE_SCALING_KINDS)}")
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ExportError(f"rope_scaling: factor {self.factor} is not a positive number")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ExportError(
                f"rope_scaling: low_freq_factor {self.low_freq_factor} must be positive and below "
                f"high_freq_factor {self.high_freq_factor}"
            )
        if self.original_max_position_embeddings < 1:
            raise ExportError(
                f"rope_scaling: original_max_position_embeddings {self.original_max_position_embeddings} "
                "is not positive"
            )
        if self.kind == "yarn" and not (self.factor >= 1 and 0 < self.beta_slow < self.beta_fast):
            raise ExportError(
                f"rope_scaling: yarn wants factor {self.factor} to be at least 1 and beta_slow {self.beta_slow} "
                f"positive and below beta_fast {self.beta_fast}"
            )


class ModelConfig(Struct, frozen=True, kw_only=True):
    """One decoder-only transformer, all layers alike except for `moe_layer_freq`.

    Raises:
        ExportError: from construction, one message with every field or pair of fields that cannot be.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int  # of one dense MLP: columns of linear_fc2; gate and up have this many rows each
    num_attention_heads: int
    num_query_groups: int  # key/value heads; equals num_attention_heads without grouped-query attention
    head_size: int  # Megatron's kv_channels; not always hidden_size / num_attention_heads
    activation: Activation  # "gelu" is the exact erf form
    gated: bool  # activation(gate) * up: silu is SwiGLU, gelu is GeGLU
    normalization: Normalization
    zero_centered_norm: bool  # stored norm weights are gamma - 1
    norm_epsilon: float
    linear_bias: bool  # biases on attention out and MLP linears
    qkv_bias: bool
    position_embedding: PositionEmbedding
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False  # adjacent pairs rotate (GPT-J) instead of halves (GPT-NeoX)
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int
    tied_embeddings: bool  # the output layer is the word embedding
    padded_vocab_size: int  # rows of the embedding in the checkpoint
    vocab_size: int  # rows that mean something; equals padded_vocab_size where nothing proves it
    qk_norm: bool = False  # norms of head_size on q and k
    num_experts: int = 0  # 0: dense
    moe_top_k: int = 0
    moe_ffn_hidden_size: int = 0  # of one expert
    moe_glu_interleave_size: int = 0  # rows of gate, then of up, that alternate in the experts' stored fc1; 0: halves
    moe_glu_interleave_num_shards: int = 1  # expert-tp ranks that saved it: each alternates within its own rows
    moe_layer_freq: tuple[int, ...] | None = None  # 1 = MoE, 0 = dense, per layer; None: all layers alike
    moe_shared_expert_ffn_hidden_size: int = 0  # 0: no shared expert
    moe_shared_expert_gate: bool = False
    moe_router_pre_softmax: bool = False  # softmax over all experts before the top-k, not over the top-k
    moe_router_score_function: RouterScoreFunction = "softmax"
    moe_router_expert_bias: bool = False  # selection bias of aux-loss-free balancing
    moe_router_num_groups: int | None = None
    moe_router_group_top_k: int | None = None
    moe_router_scaling_factor: float | None = None
    window_size: int | None = None  # tokens to the left that a token sees, itself not counted; None: all
    window_layers: tuple[int, ...] | None = None  # 1 = within the window, 0 = sees all, per layer; None: all within it
    attention_output_gate: bool = False
    embedding_scaling: bool = False  # word embeddings are multiplied by sqrt(hidden_size)
    post_norms: bool = False  # what attention and MLP return is normed before it is added to the residual
    query_pre_attn_scalar: float | None = None  # scores are divided by its square root; None: by that of head_size
    attn_logit_softcapping: float | None = None  # scores x become c tanh(x / c); None: they stay
    final_logit_softcapping: float | None = None
    parallel_attention: bool = False  # attention and MLP both read the layer's input and are added together
    separate_mlp_norm: bool = True  # without, which only parallel layers can be, the MLP takes what attention takes
    attention_sinks: bool = False  # a learned number per head takes part in every softmax
    glu_offset: float = 0.0  # added to the up half before it is multiplied with the activated gate
    activation_clamp: float | None = None  # the gate is at most this, the up half within it either way; None: any
    kv_lora_rank: int = 0  # of the latent that keys and values are made of; 0: ordinary attention, and no more of these
    q_lora_rank: int = 0  # of the latent that queries are made of; 0: made of the hidden state
    qk_nope_head_size: int = 0  # elements of a query or key head that are not rotated; head_size is both parts
    qk_rope_head_size: int = 0
    value_head_size: int = 0
    num_mtp_layers: int = 0  # after the last one; each predicts one token further
    blocks: Blocks | None = None  # layers that differ; num_query_groups and ffn_hidden_size are of the first such

    def __post_init__(self) -> None:
        faults = Faults("model configuration")
        _check_sizes(self, faults)
        _check_choices(self, faults)
        if not faults:  # the pairs below divide by sizes
            _check_attention(self, faults)
            _check_vocabulary(self, faults)
            _check_experts(self, faults)
            _check_blocks(self, faults)
        faults.raise_if_any()

    def has_window(self, layer: int) -> bool:
        """Whether tokens of a layer see no further than `window_size`."""
        return self.window_size is not None and (self.window_layers is None or self.window_layers[layer] == 1)

    def of_layer(self, layer: int) -> ModelConfig:
        """The configuration with the sizes of one layer; itself where all layers are alike, and for layer -1."""
        return self if self.blocks is None or layer < 0 else _of_layer(self, layer)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in place of a dense MLP."""
        return self.num_experts > 0 and (self.moe_layer_freq is None or self.moe_layer_freq[layer] == 1)


@lru_cache(maxsize=1024)
def _of_layer(config: ModelConfig, layer: int) -> ModelConfig:
    assert config.blocks is not None
    block = config.blocks.layers[layer]
    return replace(
        config,
        num_query_groups=block.num_query_groups or config.num_query_groups,
        ffn_hidden_size=block.ffn_hidden_size or config.ffn_hidden_size,
        blocks=None,
    )


_POSITIVE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_size",
    "max_position_embeddings",
    "padded_vocab_size",
    "vocab_size",
    "moe_glu_interleave_num_shards",
)
_NOT_NEGATIVE = (
    "num_experts",
    "moe_top_k",
    "moe_ffn_hidden_size",
    "moe_glu_interleave_size",
    "moe_shared_expert_ffn_hidden_size",
    "q_lora_rank",
    "kv_lora_rank",
    "num_mtp_layers",
)
_POSITIVE_IF_GIVEN = ("moe_router_num_groups", "moe_router_group_top_k", "window_size")
_POSITIVE_NUMBERS = (
    *("norm_epsilon", "rotary_base", "rotary_percent", "moe_router_scaling_factor"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
)


def _check_sizes(config: ModelConfig, faults: Faults) -> None:
    for field in _POSITIVE:
        if getattr(config, field) < 1:
            faults.add(f"{field} is {getattr(config, field)}, must be positive")
    for field in _NOT_NEGATIVE:
        if getattr(config, field) < 0:
            faults.add(f"{field} is {getattr(config, field)}, must not be negative")
    for field in _POSITIVE_IF_GIVEN:
        value = getattr(config, field)
        if value is not None and value < 1:
            faults.add(f"{field} is {value}, must be positive (or none)")
    for field in _POSITIVE_NUMBERS:
        value = getattr(config, field)
        if value is not None and not (math.isfinite(value) and value > 0):
            faults.add(f"{field} is {value}, must be a positive number")
    if config.rotary_percent > 1:
        faults.add(f"rotary_percent is {config.rotary_percent}, must be at most 1")


def _check_choices(config: ModelConfig, faults: Faults) -> None:
    for field, choices in CHOICES.items():
        value = getattr(config, field)
        if value not in choices:
            faults.add(f"{field} is {value!r}, must be one of {', '.join(choices)}")


#: Fields that hold one of a few words.
CHOICES: dict[str, tuple[str, ...]] = {
    "activation": ACTIVATIONS,
    "normalization": NORMALIZATIONS,
    "position_embedding": POSITION_EMBEDDINGS,
    "moe_router_score_function": ROUTER_SCORE_FUNCTIONS,
}


def _check_attention(config: ModelConfig, faults: Faults) -> None:
    if config.num_attention_heads % config.num_query_groups:
        faults.add(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_query_groups {config.num_query_groups}"
        )
    _check_layer_flags(config, "window_layers", "0 (sees all) and 1 (within the window)", faults)
    if config.window_layers is not None and config.window_size is None:
        faults.add("window_layers is given but window_size is not")
    if not config.separate_mlp_norm and not config.parallel_attention:
        faults.add("separate_mlp_norm is false but parallel_attention is not set")
    if config.position_embedding != "rope":
        if config.rope_scaling is not None:
            faults.add(f"rope_scaling is given but position_embedding is {config.position_embedding}")
        return
    if config.kv_lora_rank:
        _check_latent_attention(config, faults)
        return
    rotary_size = int(config.head_size * config.rotary_percent)
    if rotary_size < 2 or rotary_size % 2:
        faults.add(
            f"rotary_percent {config.rotary_percent} of head_size {config.head_size} rotates {rotary_size} "
            "elements, must be a positive even number"
        )


def _check_latent_attention(config: ModelConfig, faults: Faults) -> None:
    parts = (config.qk_nope_head_size, config.qk_rope_head_size)
    if min(*parts, config.value_head_size) < 1 or config.qk_rope_head_size % 2:
        faults.add(
            f"qk_nope_head_size {parts[0]}, qk_rope_head_size {parts[1]} and value_head_size {config.value_head_size} "
            "must be positive, the rotated one even"
        )
    if config.head_size != sum(parts):
        faults.add(f"head_size {config.head_size} is not qk_nope_head_size {parts[0]} + qk_rope_head_size {parts[1]}")


def _check_vocabulary(config: ModelConfig, faults: Faults) -> None:
    if config.vocab_size > config.padded_vocab_size:
        faults.add(f"vocab_size {config.vocab_size} is above padded_vocab_size {config.padded_vocab_size}")


def _check_blocks(config: ModelConfig, faults: Faults) -> None:
    if config.blocks is None:
        return
    if len(config.blocks.layers) != config.num_layers:
        faults.add(f"blocks has {len(config.blocks.layers)} entries for num_layers {config.num_layers}")
    for layer, block in enumerate(config.blocks.layers):
        if block.num_query_groups and config.num_attention_heads % block.num_query_groups:
            faults.add(
                f"blocks: num_attention_heads {config.num_attention_heads} is not a multiple of the "
                f"{block.num_query_groups} key/value heads of layer {layer}"
            )
    if config.num_experts:
        faults.add(f"blocks are given but num_experts is {config.num_experts}")


def _check_experts(config: ModelConfig, faults: Faults) -> None:
    if config.num_experts == 0:
        if config.moe_layer_freq is not None:
            faults.add("moe_layer_freq is given but num_experts is 0")
        return
    if not 1 <= config.moe_top_k <= config.num_experts:
        faults.add(f"moe_top_k {config.moe_top_k} must lie in 1..num_experts {config.num_experts}")
    if config.moe_ffn_hidden_size < 1:
        faults.add(f"moe_ffn_hidden_size is {config.moe_ffn_hidden_size}, must be positive")
    if config.moe_shared_expert_gate and not config.moe_shared_expert_ffn_hidden_size:
        faults.add("moe_shared_expert_gate is set but moe_shared_expert_ffn_hidden_size is 0")
    _check_layer_flags(config, "moe_layer_freq", "0 (dense) and 1 (MoE)", faults)
    _check_router_groups(config, faults)


def _check_layer_flags(config: ModelConfig, field: str, meaning: str, faults: Faults) -> None:
    layers = getattr(config, field)
    if layers is None:
        return
    if len(layers) != config.num_layers:
        faults.add(f"{field} has {len(layers)} entries for num_layers {config.num_layers}")
    if not set(layers) <= {0, 1}:
        faults.add(f"{field} {list(layers)} may hold only {meaning}")


def _check_router_groups(config: ModelConfig, faults: Faults) -> None:
    groups, group_top_k = config.moe_router_num_groups, config.moe_router_group_top_k
    if (groups is None) != (group_top_k is None):
        faults.add(
            f"moe_router_num_groups is {groups} and moe_router_group_top_k is {group_top_k}: "
            "both or neither must be given"
        )
        return
    if groups is None or group_top_k is None:
        return
    if config.num_experts % groups:
        faults.add(f"num_experts {config.num_experts} is not a multiple of moe_router_num_groups {groups}")
    if group_top_k > groups:
        faults.add(f"moe_router_group_top_k {group_top_k} is above moe_router_num_groups {groups}")
