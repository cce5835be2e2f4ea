"""What tensor shapes prove about a model: the second source of its configuration and the check on the first.

Shapes are those of one layer under folded names ("decoder.layers.{layer}.…", experts "{expert}"), weights
[out, in] (Megatron-Core `sharded_state_dict` of GPTModel). Nothing is concluded from a tensor that is missing
unless its module's weight is there.
"""

from __future__ import annotations

from collections.abc import Mapping

from dist_export.errors import Faults
from dist_export.models.provenance import Claim, from_presence, from_tensor

Shapes = Mapping[str, tuple[int, ...]]

LAYER = "decoder.layers.{layer}."
WORD_EMBEDDING = "embedding.word_embeddings.weight"
POSITION_EMBEDDING = "embedding.position_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm"
QKV = LAYER + "self_attention.linear_qkv"
ATTENTION_OUT = LAYER + "self_attention.linear_proj"
POST_NORM = ATTENTION_OUT + ".post_layernorm.weight"
Q_NORM = LAYER + "self_attention.q_layernorm.weight"
SINKS = LAYER + "self_attention.core_attention.softmax_offset"
DENSE_MLP = LAYER + "mlp."
EXPERT = LAYER + "mlp.experts.experts.{expert}."
SHARED_EXPERT = LAYER + "mlp.shared_experts."
SHARED_EXPERT_GATE = SHARED_EXPERT + "gate_weight"
ROUTER = LAYER + "mlp.router."

#: Tensors whose dims are looked at, and how many dims each must have.
_RANKS = {
    WORD_EMBEDDING: 2,
    POSITION_EMBEDDING: 2,
    OUTPUT_LAYER: 2,
    FINAL_NORM + ".weight": 1,
    QKV + ".weight": 2,
    ATTENTION_OUT + ".weight": 2,
    Q_NORM: 1,
    ROUTER + "weight": 2,
    **{
        f"{LAYER}self_attention.linear_{part}.weight": 2
        for part in ("q_proj", "q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj")
    },
    **{
        prefix + linear: 2
        for prefix in (DENSE_MLP, EXPERT, SHARED_EXPERT)
        for linear in ("linear_fc1.weight", "linear_fc2.weight")
    },
}

#: Dims that are hidden_size besides the embedding's: (tensor, dim).
_HIDDEN_DIMS = (
    (QKV + ".weight", 1),
    (ATTENTION_OUT + ".weight", 0),
    (LAYER + "self_attention.linear_kv_down_proj.weight", 1),
    (DENSE_MLP + "linear_fc2.weight", 0),
    (EXPERT + "linear_fc2.weight", 0),
    (ROUTER + "weight", 1),
    (OUTPUT_LAYER, 1),
    (FINAL_NORM + ".weight", 0),
)


def checked_shapes(shapes: Shapes, faults: Faults) -> Shapes:
    """`shapes` without tensors of the wrong number of dims, which are faults."""
    for name, rank in _RANKS.items():
        if name in shapes and len(shapes[name]) != rank:
            faults.add(f"{name} has shape {tuple(shapes[name])}, expected {rank} dims")
    return {name: shape for name, shape in shapes.items() if len(shape) == _RANKS.get(name, len(shape))}


def claims_from_shapes(shapes: Shapes, num_layers_found: int, faults: Faults) -> dict[str, Claim]:
    """Every field that `shapes` (checked) and the number of layers prove; shapes that disagree are faults.

    Heads, groups and head size are not here: they need one of the three first (`attention.complete`).
    """
    claims: dict[str, Claim] = {}
    if num_layers_found:
        claims["num_layers"] = Claim(num_layers_found, "decoder layers found", f"({num_layers_found})")
    claims |= _embedding_claims(shapes)
    claims |= _norm_claims(shapes)
    claims |= _bias_claims(shapes, faults)
    claims |= _mlp_claims(shapes, faults)
    claims |= _expert_claims(shapes)
    _check_hidden_dims(shapes, claims.get("hidden_size"), faults)
    return claims


def shape_claim(shapes: Shapes, name: str, dim: int, value: object = None) -> Claim | None:
    """A claim from dim `dim` of tensor `name`, or of `value` that this shape proves; None without the tensor."""
    shape = shapes.get(name)
    if shape is None:
        return None
    return Claim(shape[dim] if value is None else value, from_tensor(name), str(tuple(shape)))


def _present(claims: dict[str, Claim | None]) -> dict[str, Claim]:
    return {field: claim for field, claim in claims.items() if claim is not None}


def _presence_claim(shapes: Shapes, name: str, *, beside: str, value: bool | None = None) -> Claim | None:
    """Whether `name` is there, provided that `beside` is; `value` is what presence means (default True)."""
    if beside not in shapes:
        return None
    present = name in shapes
    meaning = present if value is None else (present == value)
    return Claim(meaning, from_presence(name, present=present))


def _embedding_claims(shapes: Shapes) -> dict[str, Claim]:
    positions = POSITION_EMBEDDING in shapes
    source = from_presence(POSITION_EMBEDDING, present=True)
    return _present(
        {
            "padded_vocab_size": shape_claim(shapes, WORD_EMBEDDING, 0),
            "hidden_size": shape_claim(shapes, WORD_EMBEDDING, 1) or shape_claim(shapes, QKV + ".weight", 1),
            "max_position_embeddings": shape_claim(shapes, POSITION_EMBEDDING, 0),
            "position_embedding": Claim("learned_absolute", source) if positions else None,
            "tied_embeddings": _presence_claim(shapes, OUTPUT_LAYER, beside=WORD_EMBEDDING, value=False),
        }
    )


def _norm_claims(shapes: Shapes) -> dict[str, Claim]:
    """A LayerNorm always has a bias in Megatron, an RMSNorm never."""
    bias = _presence_claim(shapes, FINAL_NORM + ".bias", beside=FINAL_NORM + ".weight")
    kind = None if bias is None else Claim("LayerNorm" if bias.value else "RMSNorm", bias.source)
    return _present(
        {
            "normalization": kind,
            "post_norms": _presence_claim(shapes, POST_NORM, beside=ATTENTION_OUT + ".weight"),
            "qk_norm": _presence_claim(shapes, Q_NORM, beside=QKV + ".weight"),
            "attention_sinks": _presence_claim(shapes, SINKS, beside=QKV + ".weight"),
        }
    )


def _bias_claims(shapes: Shapes, faults: Faults) -> dict[str, Claim]:
    """`linear_bias` where attention out and MLP agree. Shared experts never have biases in Megatron."""
    linears = [ATTENTION_OUT, *(prefix + fc for prefix in (DENSE_MLP, EXPERT) for fc in ("linear_fc1", "linear_fc2"))]
    found = {name: _has_bias(shapes, name) for name in linears if _has_weight(shapes, name)}
    claims = _present({"qkv_bias": _presence_claim(shapes, QKV + ".bias", beside=QKV + ".weight")})
    if len(set(found.values())) > 1:
        names = ", ".join(name + ".bias" for name, has_bias in found.items() if has_bias)
        missing = ", ".join(name for name, has_bias in found.items() if not has_bias)
        faults.add(f"linear_bias: tensors {names} are present, but {missing} have no bias")
    elif found:
        name, has_bias = next(iter(found.items()))
        claims["linear_bias"] = Claim(has_bias, from_presence(name + ".bias", present=has_bias))
    return claims


def _has_weight(shapes: Shapes, linear: str) -> bool:
    return f"{linear}.weight" in shapes or f"{linear}.weight_w" in shapes


def _has_bias(shapes: Shapes, linear: str) -> bool:
    return f"{linear}.bias" in shapes or f"{linear}.bias_w" in shapes


def _mlp_claims(shapes: Shapes, faults: Faults) -> dict[str, Claim]:
    """`gated` and the MLP widths. linear_fc1 has f rows, or 2f when gated: one tensor, or `weight_w`
    (gate) and `weight_v` (up) of f rows each."""
    widths = {
        "ffn_hidden_size": DENSE_MLP,
        "moe_ffn_hidden_size": EXPERT,
        "moe_shared_expert_ffn_hidden_size": SHARED_EXPERT,
    }
    claims: dict[str, Claim | None] = {}
    for field, prefix in widths.items():
        claims[field] = shape_claim(shapes, prefix + "linear_fc2.weight", 1)
        gated = _gated_claim(shapes, prefix, faults)
        claims["gated"] = claims.get("gated") or gated
        first = claims["gated"]
        if gated and first and gated.value != first.value:
            faults.add(f"gated: {first} says {first.value}, {gated} says {gated.value}")
    return _present(claims)


def _gated_claim(shapes: Shapes, prefix: str, faults: Faults) -> Claim | None:
    fc1, fc2 = prefix + "linear_fc1.weight", prefix + "linear_fc2.weight"
    if fc1 + "_w" in shapes:
        return Claim(True, from_presence(fc1 + "_w", present=True))
    if fc1 not in shapes or fc2 not in shapes:
        return None
    rows, columns = shapes[fc1][0], shapes[fc2][1]
    if rows not in (columns, 2 * columns):
        faults.add(
            f"gated: {fc1} {tuple(shapes[fc1])} has {rows} rows, expected {columns} or {2 * columns} "
            f"for {fc2} {tuple(shapes[fc2])}"
        )
        return None
    return shape_claim(shapes, fc1, 0, rows != columns)


def _expert_claims(shapes: Shapes) -> dict[str, Claim]:
    router = ROUTER + "weight"
    if router not in shapes:
        dense = _has_weight(shapes, DENSE_MLP + "linear_fc1")
        return {"num_experts": Claim(0, from_presence(router, present=False))} if dense else {}
    shared = SHARED_EXPERT + "linear_fc2.weight"
    absent = Claim(0, from_presence(shared, present=False))
    return _present(
        {
            "num_experts": shape_claim(shapes, router, 0),
            "moe_router_expert_bias": _presence_claim(shapes, ROUTER + "expert_bias", beside=router),
            "moe_shared_expert_ffn_hidden_size": shape_claim(shapes, shared, 1) or absent,
            "moe_shared_expert_gate": _presence_claim(shapes, SHARED_EXPERT_GATE, beside=router),
        }
    )


def _check_hidden_dims(shapes: Shapes, hidden: Claim | None, faults: Faults) -> None:
    if hidden is None:
        return
    for name, dim in _HIDDEN_DIMS:
        shape = shapes.get(name)
        if shape is not None and shape[dim] != hidden.value:
            faults.add(f"hidden_size: {hidden} gives {hidden.value}, but dim {dim} of {name} is {shape}[{dim}]")
