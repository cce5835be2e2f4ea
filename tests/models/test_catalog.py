"""The same weight under a stacked key, a key per layer, a key per expert: found by looking, wherever it lies."""

from __future__ import annotations

import pytest

from dist_export.errors import ExportError
from dist_export.models.catalog import SourceCatalog, fold
from dist_export.tensors.views import Slab

FC1 = "mlp.linear_fc1.weight"
EXPERT_FC1 = "mlp.experts.experts.linear_fc1.weight"


def catalog(**shapes: tuple[int, ...]) -> SourceCatalog:
    return SourceCatalog({name: (shape, "bfloat16") for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("decoder.layers.3.mlp.linear_fc1.weight", ("decoder.layers.{layer}.mlp.linear_fc1.weight", 3, -1)),
        ("decoder.layers.mlp.linear_fc1.weight", ("decoder.layers.{layer}.mlp.linear_fc1.weight", -1, -1)),
        ("decoder.layers.mlp.experts.experts.linear_fc2.weight",
         ("decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc2.weight", -1, -1)),
        ("decoder.layers.12.mlp.experts.experts.07.linear_fc2.weight",
         ("decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc2.weight", 12, 7)),
        ("mtp.layers.0.eh_proj.weight", ("mtp.layers.{layer}.eh_proj.weight", 0, -1)),
        ("decoder.final_layernorm.weight", ("decoder.final_layernorm.weight", -1, -1)),
        ("embedding.word_embeddings.weight", ("embedding.word_embeddings.weight", -1, -1)),
    ],
)  # fmt: skip
def test_numbers_become_holes(name: str, folded: tuple[str, int, int]) -> None:
    pattern, numbers, holes = fold(name)
    assert (pattern, numbers["layer"], numbers["expert"]) == folded
    assert holes == [hole for hole in ("layer", "expert") if "{" + hole + "}" in pattern]


def test_layers_stacked_or_apart_are_the_same_tensors() -> None:
    pattern = "decoder.layers.{layer}." + FC1
    stacked = SourceCatalog({"decoder.layers." + FC1: ((3, 8, 4), "bfloat16")})
    apart = SourceCatalog({f"decoder.layers.{i}.{FC1}": ((8, 4), "bfloat16") for i in range(3)})
    for which in (stacked, apart):
        assert (which.num_layers, list(which.patterns()), which.folded_shapes()) == (3, [pattern], {pattern: (8, 4)})
    found = [(stacked.find(pattern, layer=i), apart.find(pattern, layer=i)) for i in range(3)]
    assert [str(a.slab) for a, _ in found if a] == [f"decoder.layers.{FC1}[{i}]" for i in range(3)]
    assert [b.slab for _, b in found if b] == [Slab(f"decoder.layers.{i}.{FC1}") for i in range(3)]
    assert all(a and b and a.shape == b.shape == (8, 4) for a, b in found)
    assert stacked.find(pattern, layer=3) is None
    assert stacked.names(pattern) == {"decoder.layers." + FC1}
    assert sorted(stacked.slabs()) == [Slab("decoder.layers." + FC1, (i,)) for i in range(3)]


@pytest.mark.parametrize(
    ("shapes", "slab"),
    [
        ({"decoder.layers." + EXPERT_FC1: (2, 4, 8, 6)}, Slab("decoder.layers." + EXPERT_FC1, (1, 3))),
        ({f"decoder.layers.{i}.{EXPERT_FC1}": (4, 8, 6) for i in range(2)},
         Slab("decoder.layers.1." + EXPERT_FC1, (3,))),
        ({f"decoder.layers.{i}.mlp.experts.experts.{e}.linear_fc1.weight": (8, 6) for i in range(2) for e in range(4)},
         Slab("decoder.layers.1.mlp.experts.experts.3.linear_fc1.weight")),
    ],
    ids=["both stacked", "experts stacked", "one key each"],
)  # fmt: skip
def test_experts(shapes: dict[str, tuple[int, ...]], slab: Slab) -> None:
    experts = catalog(**shapes)
    pattern = "decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc1.weight"
    found = experts.find(pattern, layer=1, expert=3)
    assert found is not None
    assert (found.slab, found.shape, experts.num_experts(), experts.num_layers) == (slab, (8, 6), 4, 2)
    assert len(list(experts.slabs())) == 8


def test_a_mixture_of_both_ways_and_dense_layers_among_experts() -> None:
    mixed = catalog(
        **{"decoder.layers." + FC1: (2, 8, 4), "decoder.layers.2." + FC1: (8, 4), "embedding.weight": (16, 4)}
    )
    pattern = "decoder.layers.{layer}." + FC1
    assert [str(mixed.find(pattern, layer=i).slab) for i in range(3)] == [  # type: ignore[union-attr]
        f"decoder.layers.{FC1}[0]", f"decoder.layers.{FC1}[1]", f"decoder.layers.2.{FC1}"
    ]  # fmt: skip
    dense_first = catalog(**{"decoder.layers.0." + FC1: (8, 4), "decoder.layers.1." + EXPERT_FC1: (4, 8, 6)})
    assert dense_first.num_layers == 2
    assert dense_first.find(pattern, layer=1) is None


def test_dtypes_of_all_layers_are_known() -> None:
    names = {f"decoder.layers.{i}.{FC1}": ((8, 4), dtype) for i, dtype in enumerate(("bfloat16", "float32"))}
    assert SourceCatalog(names).dtype("decoder.layers.{layer}." + FC1) == "bfloat16, float32"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"decoder.layers." + FC1: (2, 8, 4), "decoder.layers.1." + FC1: (8, 4)}, "both hold layer 1"),
        ({"decoder.layers.mlp.scale": ()}, r"shape \[\] has no dim for layer"),
        ({"decoder.layers." + EXPERT_FC1: (2,)}, r"shape \[2\] has no dim for layer and expert"),
        ({"decoder.layers.mlp.experts.experts.3.linear_fc1.weight": (2, 8, 6)}, "stacked over layers but numbered"),
    ],
)
def test_what_no_release_writes_is_refused(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        catalog(**shapes)
