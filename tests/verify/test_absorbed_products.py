"""Products of latent attention, which no inverse rule rebuilds: what is wrong with one is found and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from verify.faulty import Tensors, adopt_the_plan, change, export_to, messages, verify

from dist_export.convert import absorb
from dist_export.models import shard_ops
from dist_export.models.shard_ops import TensorParallel
from dist_export.plan.recipes import Absorbed
from dist_export.plan.shard import PlannedTensor, Resolved, ShardPlanner
from dist_export.targets.trtllm.target import TrtllmOptions
from dist_export.tensors.dtypes import dtype_by_name
from dist_export.verify.absorbed import _beyond

CHECKPOINT = Path(__file__).parents[1] / "conformance" / "checkpoints" / "deepseek_v2_groups_core_0_16"
FUSED = "transformer.layers.{}.attention.fused_q_proj"
HEAD = 12 + 4  # rows of a head: latents, then rotated ones


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return export_to(CHECKPOINT, tmp_path / "out", TrtllmOptions(tp_size=2))


def test_every_byte_is_compared_once(output: Path) -> None:
    report = verify(CHECKPOINT, output)
    assert report.ok, str(report)
    assert report.num_bytes_compared == report.num_bytes_checked


def flip_last_bit(files: Tensors) -> None:
    files["rank1.safetensors"][FUSED.format(1)][HEAD + 3, 5] ^= 1


def flip_rotated(files: Tensors) -> None:
    files["rank1.safetensors"][FUSED.format(1)][HEAD + 14, 5] ^= 1


def swap_heads(files: Tensors) -> None:
    tensor = files["rank0.safetensors"][FUSED.format(0)]
    tensor[:] = np.concatenate([tensor[HEAD:], tensor[:HEAD]])


def swap_ranks(files: Tensors) -> None:
    first, second = (files[f"rank{rank}.safetensors"] for rank in (0, 1))
    name = FUSED.format(0)
    first[name], second[name] = second[name], first[name]


def not_a_number(files: Tensors) -> None:
    files["rank0.safetensors"][FUSED.format(0)][0, 0] = 0x7FC0


@pytest.mark.parametrize(
    "edit, expected",
    [
        (flip_last_bit, "rank1.safetensors: {1}: 1 elements .* row 19, column 5 .layer 1, head 3, latent 3."),
        (flip_rotated, "rank1.safetensors: {1}: 1 elements .* row 30, column 5 .layer 1, head 3, rotated row 2."),
        (swap_heads, "rank0.safetensors: {0}: 5.. elements .* row 0, column 0 .layer 0, head 0, latent 0."),
        (swap_ranks, "rank0.safetensors: {0}: 5.. elements .* head 0"),
        (not_a_number, "rank0.safetensors: {0}: 1 elements .* row 0, column 0"),
    ],
)
def test_wrong_values_are_named(edit: Callable[[Tensors], None], expected: str, output: Path) -> None:
    change(output, edit)
    found = messages(verify(CHECKPOINT, output, "rebuild"))
    pattern = "rebuild: " + expected.replace("{0}", FUSED.format(0)).replace("{1}", FUSED.format(1))
    assert_matches(pattern, found[0])
    assert len(found) == (2 if edit is swap_ranks else 1)


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def test_arithmetic_that_forgets_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(*arguments: object) -> torch.Tensor:
        return torch_einsum(*arguments) * 2  # type: ignore[arg-type]

    torch_einsum = torch.einsum
    monkeypatch.setattr(absorb.torch, "einsum", doubled)
    output = export_to(CHECKPOINT, tmp_path / "out", TrtllmOptions())
    monkeypatch.undo()
    found = messages(verify(CHECKPOINT, output))
    assert [each.split(": ")[2] for each in found] == [FUSED.format(0), FUSED.format(1)]


def test_a_plan_that_takes_the_keys_of_another_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ShardPlanner._absorbed

    def wrong(self: ShardPlanner, resolved: Resolved) -> PlannedTensor:
        other = TensorParallel(1 - resolved.tp.rank, resolved.tp.size)
        keys = resolved.slices[0][1]
        taken = shard_ops.HEADS.take(keys.tensor.view, other, self.logical.config)
        planned = plain(self, resolved)
        assert isinstance(planned.recipe, Absorbed)
        return replace(planned, recipe=replace(planned.recipe, keys=taken))

    monkeypatch.setattr(ShardPlanner, "_absorbed", wrong)
    output = export_to(CHECKPOINT, tmp_path / "out", TrtllmOptions(tp_size=2))
    monkeypatch.undo()
    adopt_the_plan(CHECKPOINT, output)
    found = messages(verify(CHECKPOINT, output, "coverage", "rebuild"))
    assert len(found) == 4, found
    assert all("are not the product of" in each for each in found)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_sums_of_many_products_may_be_added_in_any_order(name: str) -> None:
    """128 rows, as in the published models: what torch rounds is accepted, almost every change of a bit is not."""
    generator, dtype = torch.Generator().manual_seed(1), getattr(torch, name)
    queries, keys = ((torch.randn(128, n, generator=generator) * 0.02).to(dtype) for n in (96, 64))
    product = torch.einsum("dq,dk->kq", queries, keys)

    def beyond(found: torch.Tensor) -> np.ndarray:
        return _beyond(*(each.float().numpy() for each in (found, queries, keys)), dtype_by_name(name))

    assert not beyond(product).any()
    for bit, least in ((0, 0.7), (3, 0.95)):
        assert beyond((product.view(torch.int16) ^ (1 << bit)).view(dtype)).mean() > least
