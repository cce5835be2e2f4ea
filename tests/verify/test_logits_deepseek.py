"""DeepSeek-V2's exports for TensorRT-LLM compute what Megatron-Core's latent attention and experts compute, of a prompt
and of generated tokens, and wrong ones are caught."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from safetensors.torch import save_file  # noqa: E402
from support.exports import config_of, export, tensors_of  # noqa: E402

from dist_export import api  # noqa: E402
from dist_export.api import Source  # noqa: E402
from dist_export.errors import ExportError  # noqa: E402
from dist_export.verify import trace as at  # noqa: E402
from dist_export.verify.logits import LogitsReport, compare_logits, verify_logits  # noqa: E402
from dist_export.verify.megatron_adapter import run_megatron  # noqa: E402
from dist_export.verify.megatron_weights import Rounding  # noqa: E402
from dist_export.verify.trace import Point, Trace  # noqa: E402
from dist_export.verify.trtllm_interpreter import TrtllmModel, run_trtllm  # noqa: E402

CHECKPOINTS = Path(__file__).parents[1] / "conformance" / "checkpoints"
GROUPS, LITE = (CHECKPOINTS / f"deepseek_v2_{name}_core_0_16" for name in ("groups", "lite"))
MEASURED = 2e-5
"""As of other families; 4e-6 was found."""
# Of the checkpoints: 4 heads of 8 plain and 4 rotated elements, latents of 16 for queries and 12 for keys.
PLAIN, ROTATED, LATENT = 8, 4, 12
TOKENS = torch.randint(0, 119, (1, 24), generator=torch.Generator().manual_seed(2))

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return export(GROUPS, tmp_path_factory.mktemp("deepseek") / "out", "--tp", 2)


@pytest.fixture(scope="module")
def reference() -> Trace:
    """What `verify_logits` compares an export with."""
    model = api.open_model(Source(checkpoint=GROUPS))
    rounding = Rounding(torch.bfloat16, stores_one=True, keeps_router=True, absorbs_keys=True)
    return run_megatron(model.checkpoint.index, model.resolved.config, TOKENS, rounding=rounding)


@pytest.mark.parametrize(
    ("checkpoint", "target"),
    [
        (GROUPS, ("--trtllm-version", "0.15", "--dtype", "float16")),
        (GROUPS, ("--tp", 2, "--moe-ep", 2)),
        (LITE, ("--tp", 2, "--pp", 2)),
    ],
    ids=["groups-0.15", "groups-tp2-ep2", "lite-tp2-pp2"],
)
def test_an_export_computes_the_checkpoints_model(checkpoint: Path, target: tuple[object, ...], tmp_path: Path) -> None:
    report = verify_logits(checkpoint, export(checkpoint, tmp_path / "out", *target))
    assert report.agrees, str(report)
    assert report.difference.relative_difference < MEASURED
    assert max(state.relative for state in report.states) < MEASURED
    assert report.difference.top1_agreement == 1
    attention = {
        Point(name, layer) for name in (at.QUERY, at.KEY, at.VALUE, at.GENERATION_QUERY, at.CONTEXT) for layer in (0, 1)
    }
    assert {state.point for state in report.states} >= attention | {Point(at.ROUTER, 1)}
    assert report.from_training is not None, "products are rounded"
    assert 1e-4 < report.from_training.relative_difference < 5e-2


def test_a_prompt_is_computed_without_the_rounded_products(two_ranks: Path) -> None:
    tokens = torch.arange(40).reshape(2, 20)
    model = TrtllmModel.open(two_ranks)
    whole, part = model.logits(tokens), model.logits(tokens[:, :7])
    torch.testing.assert_close(whole[:, :7], part, rtol=1e-4, atol=1e-5)
    generated = run_trtllm(two_ranks, tokens).logits
    torch.testing.assert_close(generated[:, :10], whole[:, :10], rtol=1e-4, atol=1e-5)
    assert (generated - whole)[:, 10:].abs().max() > 1e-4


def rows_in_halves(tensor: torch.Tensor, head: int) -> torch.Tensor:
    """The rotated rows of heads of `head` rows, first elements of all pairs before the second."""
    heads = tensor.reshape(-1, head, tensor.shape[-1])
    plain, rotated = heads[:, : head - ROTATED], heads[:, head - ROTATED :]
    return torch.cat((plain, rotated[:, ::2], rotated[:, 1::2]), 1).reshape(tensor.shape)


def rotated_in_halves(tensors: Tensors) -> None:
    sizes = {"q_b_proj": PLAIN + ROTATED, "fused_q_proj": LATENT + ROTATED}
    for name, tensor in tensors.items():
        if name.endswith("fused_a.weight"):
            tensors[name] = rows_in_halves(tensor, tensor.shape[0])
        elif name.split(".")[-1] in sizes:
            tensors[name] = rows_in_halves(tensor, sizes[name.split(".")[-1]])


def reordered(ending: str, dim: int, *order: int) -> Callable[[Tensors], None]:
    """Exchange equal parts of tensors along a dim."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(ending)]:
            parts = tensors[name].chunk(len(order), dim)
            tensors[name] = torch.cat([parts[number] for number in order], dim)

    return change


FAULTS = {
    "two heads exchanged": (
        reordered("layers.1.attention.fused_q_proj", 0, 1, 0),
        r"agree up to layer 0, differ from layer 1, query of generation \(.*heads or rows are permuted.*fused_q_proj",
    ),
    "rotated rows in halves": (
        rotated_in_halves,
        r"layer 0, query \(.*: each head has its elements in another order: rotary halves are interleaved",
    ),
    "keys and values exchanged": (reordered("kv_b_proj", 0, 1, 0), r"layer 0, key \("),
    "experts exchanged": (
        lambda tensors: [
            reordered(f"layers.1.mlp.{name}.weight", 0, *range(7, -1, -1))(tensors) for name in ("fc", "proj")
        ],
        r"agree up to layer 0, differ from layer 1, MLP output \(",
    ),
    "halves of the shared experts exchanged": (
        reordered("shared_expert.fc.weight", 0, 1, 0),
        r"differ from layer 1, MLP output \(.*shared_expert",
    ),
}


def rewritten(
    output: Path, folder: Path, change: Callable[[Tensors], Any] | None = None, config: dict[str, Any] | None = None
) -> Path:
    """A copy of an export, its ranks' tensors and its config.json changed."""
    shutil.copytree(output, folder)
    for file in folder.glob("*.safetensors") if change is not None else ():
        tensors = tensors_of(file)
        change(tensors)
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
    (folder / "config.json").write_text(json.dumps({**config_of(output), **(config or {})}))
    return folder


def check_located(report: LogitsReport, message: str) -> None:
    assert not report.agrees
    assert re.search(message, str(report)), str(report)


def test_nothing_is_found_in_what_is_right(reference: Trace, two_ranks: Path) -> None:
    report = compare_logits(reference, run_trtllm(two_ranks, TOKENS))
    assert report.difference.relative_difference < MEASURED, str(report)
    assert report.first_difference is None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_rule_is_located(fault: str, reference: Trace, two_ranks: Path, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    check_located(
        compare_logits(reference, run_trtllm(rewritten(two_ranks, tmp_path / "faulty", change), TOKENS)), message
    )


CONFIGS = {
    "magnitude": ({"mscale": 1.0}, {}, r"layer 0, query \("),
    "scale": ({"mscale": 1.0, "mscale_all_dim": 1.0}, {}, r"layer 0, attention context \("),
    "borders": ({"beta_fast": 1.0}, {}, r"layer 0, query \(.*right at position 0 and wrong after it: rotary base"),
    "epsilon": ({}, {"norm_epsilon": 1e-2}, r"layer 0, attention norm \("),
    "groups": ({}, {"moe_topk_group": 1, "moe": None}, r"agree up to layer 0, differ from layer 1, router \("),
    "weights": ({}, {"moe_renorm_mode": 0, "moe": None}, r"agree up to layer 0, differ from layer 1, router \("),
}


@pytest.mark.parametrize("field", CONFIGS)
def test_a_wrong_field_of_config_json_is_located(field: str, reference: Trace, two_ranks: Path, tmp_path: Path) -> None:
    scaling, changes, message = CONFIGS[field]
    config = {"rotary_scaling": {**config_of(two_ranks)["rotary_scaling"], **scaling}, **changes}
    faulty = rewritten(two_ranks, tmp_path / "faulty", config=config)
    check_located(compare_logits(reference, run_trtllm(faulty, TOKENS)), message)


def test_what_is_not_interpreted(two_ranks: Path, tmp_path: Path) -> None:
    moe = {**config_of(two_ranks)["moe"], "device_limited_topk_group": 1}
    config = {"moe": moe, "rotary_scaling": {"type": "yarn"}, "v_head_dim": 6, "hidden_act": "silu"}
    with pytest.raises(ExportError) as caught:
        TrtllmModel.open(rewritten(two_ranks, tmp_path / "out", config=config))
    expected = (
        "moe.device_limited_topk_group 1 beside moe_topk_group 2",
        "without factor, beta_fast",
        "v_head_dim other than qk_nope_head_dim",
        "hidden_act silu of DeepseekV2ForCausalLM",
    )
    assert all(text in str(caught.value) for text in expected), str(caught.value)
    for number, (name, value) in enumerate((("kv_lora_rank", None), ("moe_n_group", 0), ("moe_num_shared_experts", 0))):
        with pytest.raises(ExportError, match=f"{name} {value}"):
            TrtllmModel.open(rewritten(two_ranks, tmp_path / f"size{number}", config={name: value}))
    faulty = rewritten(two_ranks, tmp_path / "faulty", lambda t: t.pop("transformer.layers.1.attention.fused_q_proj"))
    with pytest.raises(ExportError, match=r"rank1.safetensors: transformer.layers.1.attention.fused_q_proj is missing"):
        TrtllmModel.open(faulty)
