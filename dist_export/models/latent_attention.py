"""Multi-latent attention: its ranks and head sizes, from saved arguments and from shapes.

Megatron-Core's MLASelfAttention (megatron/core/transformer/multi_latent_attention.py) with nq heads, whose queries and
keys have dn unrotated and dr rotated elements and whose values have dv, and latents of rank rq and rkv:

    linear_q_proj [nq·(dn+dr), h], or linear_q_down_proj [rq, h] and linear_q_up_proj [nq·(dn+dr), rq]
    linear_kv_down_proj [rkv+dr, h], linear_kv_up_proj [nq·(dn+dv), rkv], linear_proj [h, nq·dv]

The shapes and nq prove all five sizes.
"""

from __future__ import annotations

from collections.abc import Mapping

from dist_export.errors import Faults
from dist_export.models.megatron_arguments import Arguments, ReaderFor
from dist_export.models.provenance import Claim, derived, from_arguments, from_default, from_presence, from_tensor
from dist_export.models.tensor_evidence import ATTENTION_OUT, LAYER, QKV, Shapes

SIZES = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_size": "qk_head_dim",
    "qk_rope_head_size": "qk_pos_emb_head_dim",
    "value_head_size": "v_head_dim",
}
"""Our fields -> Megatron's arguments (0.10), which have defaults even where another attention is used."""

_ATTENTION = LAYER + "self_attention."
KV_DOWN, KV_UP = _ATTENTION + "linear_kv_down_proj.weight", _ATTENTION + "linear_kv_up_proj.weight"
Q_UP, Q_WHOLE = _ATTENTION + "linear_q_up_proj.weight", _ATTENTION + "linear_q_proj.weight"
_KV_NORMS = (_ATTENTION + "linear_kv_up_proj.layer_norm_weight", _ATTENTION + "kv_layernorm.weight")


def argument_claims(reader_for: ReaderFor) -> dict[str, Claim]:
    """The five sizes; zeros where the model has ordinary attention, whatever the arguments' defaults are."""
    claims = {}
    for field, name in SIZES.items():
        arguments = reader_for(field)
        if not is_latent(arguments):
            known = arguments.has("multi_latent_attention")
            source = from_arguments if known else from_default
            claims[field] = Claim(0, source("multi_latent_attention"), default=not known)
        elif arguments.has(name):
            claims[field] = Claim(arguments.integer(name) or 0, from_arguments(name))
    return claims


def is_latent(arguments: Arguments) -> bool:
    """Whether the arguments ask for multi-latent attention."""
    return bool(arguments.values.get("multi_latent_attention"))


def shape_claims(shapes: Shapes) -> dict[str, Claim]:
    """The ranks, the rotated size and whether latents are normalised."""
    if KV_UP not in shapes or KV_DOWN not in shapes:
        if QKV + ".weight" in shapes:
            return {"kv_lora_rank": Claim(0, from_presence(KV_UP, present=False))}
        return {}
    rank, both = shapes[KV_UP][1], shapes[KV_DOWN][0]
    down = Claim(both - rank, from_tensor(KV_DOWN), str(shapes[KV_DOWN]))
    claims = {"kv_lora_rank": Claim(rank, from_tensor(KV_UP), str(shapes[KV_UP])), "qk_rope_head_size": down}
    norm = next((name for name in _KV_NORMS if name in shapes), None)
    claims["qk_norm"] = Claim(norm is not None, from_presence(norm or _KV_NORMS[0], present=norm is not None))
    if Q_UP in shapes:
        claims["q_lora_rank"] = Claim(shapes[Q_UP][1], from_tensor(Q_UP), str(shapes[Q_UP]))
    elif Q_WHOLE in shapes:
        claims["q_lora_rank"] = Claim(0, from_presence(Q_WHOLE, present=True))
    return claims


def complete(chosen: dict[str, Claim], shapes: Shapes, faults: Faults) -> None:
    """Fill in the sizes that need the number of heads, check them against the shapes, and set the fields of
    ordinary attention that follow from them."""
    heads = _integer(chosen, "num_attention_heads")
    rope = _integer(chosen, "qk_rope_head_size")
    if heads:
        _fill(chosen, shapes, heads, faults)
        chosen["num_query_groups"] = Claim(heads, derived("num_attention_heads"))
    nope = _integer(chosen, "qk_nope_head_size")
    if nope and rope:
        chosen["head_size"] = Claim(nope + rope, derived("qk_nope_head_size + qk_rope_head_size"))


def _fill(chosen: dict[str, Claim], shapes: Shapes, heads: int, faults: Faults) -> None:
    """The sizes that rows and columns divided by the heads give; each proves or contradicts what is chosen."""
    proven: dict[str, tuple[int, str]] = {}
    rope = _integer(chosen, "qk_rope_head_size") or 0
    queries = Q_UP if Q_UP in shapes else Q_WHOLE
    if queries in shapes and shapes[queries][0] % heads == 0:
        proven["qk_nope_head_size"] = (shapes[queries][0] // heads - rope, queries)
    out = ATTENTION_OUT + ".weight"
    if out in shapes and shapes[out][1] % heads == 0:
        proven["value_head_size"] = (shapes[out][1] // heads, out)
    for field, (size, name) in proven.items():
        claim = chosen.get(field)
        if claim is None or claim.default:
            chosen[field] = Claim(size, from_tensor(name), str(shapes[name]))
        elif claim.value != size:
            faults.add(
                f"{field}: {claim.source} says {claim.value}, but {name} is {shapes[name]}, which makes {size} for "
                f"num_attention_heads {heads}; if the tensors are right, give --set {field}={size}"
            )
    _check_key_value_rows(chosen, shapes, heads, faults)


def _check_key_value_rows(chosen: Mapping[str, Claim], shapes: Shapes, heads: int, faults: Faults) -> None:
    nope, value = (_integer(chosen, field) for field in ("qk_nope_head_size", "value_head_size"))
    if KV_UP in shapes and nope and value and shapes[KV_UP][0] != heads * (nope + value):
        faults.add(
            f"num_attention_heads {heads} x (qk_nope_head_size {nope} + value_head_size {value}) make "
            f"{heads * (nope + value)} rows, but {KV_UP} is {shapes[KV_UP]}"
        )


def _integer(chosen: Mapping[str, Claim], field: str) -> int | None:
    value = chosen[field].value if field in chosen else None
    return value if isinstance(value, int) and value > 0 else None
