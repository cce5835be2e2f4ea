"""Sizes of multi-latent attention that rows and columns prove, and numbers of heads that they refute."""

from __future__ import annotations

import pytest

from dist_export.errors import Faults
from dist_export.models.latent_attention import KV_DOWN, KV_UP, Q_UP, Q_WHOLE, complete, shape_claims
from dist_export.models.provenance import Claim
from dist_export.models.tensor_evidence import ATTENTION_OUT

HEADS, NOPE, ROPE, VALUE, HIDDEN, Q_RANK, KV_RANK = 4, 8, 4, 6, 32, 24, 16
SHAPES = {
    KV_DOWN: (KV_RANK + ROPE, HIDDEN),
    KV_UP: (HEADS * (NOPE + VALUE), KV_RANK),
    ATTENTION_OUT + ".weight": (HIDDEN, HEADS * VALUE),
}


def sizes_of(shapes: dict[str, tuple[int, ...]], heads: int) -> tuple[dict[str, object], Faults]:
    faults = Faults("model configuration")
    chosen = {**shape_claims(shapes), "num_attention_heads": Claim(heads, "command line")}
    complete(chosen, shapes, faults)
    return {field: claim.value for field, claim in chosen.items()}, faults


@pytest.mark.parametrize(
    "queries", [{Q_UP: (HEADS * (NOPE + ROPE), Q_RANK)}, {Q_WHOLE: (HEADS * (NOPE + ROPE), HIDDEN)}]
)
def test_shapes_and_heads_prove_every_size(queries: dict[str, tuple[int, ...]]) -> None:
    found, faults = sizes_of({**SHAPES, **queries}, HEADS)
    assert not faults
    assert found == {
        "kv_lora_rank": KV_RANK,
        "q_lora_rank": Q_RANK if Q_UP in queries else 0,
        "qk_rope_head_size": ROPE,
        "qk_nope_head_size": NOPE,
        "value_head_size": VALUE,
        "head_size": NOPE + ROPE,
        "num_attention_heads": HEADS,
        "num_query_groups": HEADS,
        "qk_norm": False,
    }


def test_a_wrong_number_of_heads_is_refuted_by_the_rows_of_keys_and_values() -> None:
    """Twice the head's size with half the heads divides everything else as well."""
    shapes = {**SHAPES, Q_WHOLE: (HEADS * (NOPE + ROPE), HIDDEN)}
    _, faults = sizes_of(shapes, HEADS // 2)
    (message,) = faults.messages
    assert message.startswith("num_attention_heads 2 x (qk_nope_head_size 20 + value_head_size 12) make 64 rows, but ")
    assert message.endswith("linear_kv_up_proj.weight is (56, 16)")
