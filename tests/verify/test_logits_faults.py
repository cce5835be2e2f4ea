"""Wrong rules are caught by logits and located, whatever the export's own checksums say.

A fault is planted in every file of a finished export alike, as a wrong rule would have written it: all tensors have
the right names, shapes and dtypes, and nothing but what the model computes shows it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from safetensors.torch import save_file  # noqa: E402
from support.exports import config_of, tensors_of  # noqa: E402

from dist_export.verify.logits import verify_logits  # noqa: E402

Tensors = dict[str, torch.Tensor]
Rule = Callable[[list[Tensors]], None]
"""Changes the tensors of all ranks, in rank order."""

# Of the checkpoints below: 4 layers, 8 heads of size 8; llama and nemotron have 2 key/value heads, gpt has 8.
HEAD, HEADS = 8, 8
LLAMA = {"style": "llama", "tp": 2, "pp": 2}
GPT = {"style": "gpt", "tp": 2}
NEMOTRON = {"style": "nemotron", "tp": 2}


def rewrite(export_folder: Path, folder: Path, rule: Rule) -> Path:
    """A copy of an export, its tensors changed by `rule`."""
    shutil.copytree(export_folder, folder)
    files = sorted(folder.glob("*.safetensors"))
    ranks = [tensors_of(file) for file in files]
    rule(ranks)
    for file, tensors in zip(files, ranks, strict=True):
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
    return folder


def qkv_of(tensor: torch.Tensor, tp: int, groups: int) -> list[torch.Tensor]:
    """Query, key and value rows of a rank's fused tensor (views)."""
    queries, keys = HEADS // tp * HEAD, max(groups // tp, 1) * HEAD
    return list(torch.split(tensor, [queries, keys, keys]))


def change_qkv(change: Callable[[int, list[torch.Tensor]], list[torch.Tensor]], *, tp: int, groups: int) -> Rule:
    """Apply `change(tp rank, [query, key, value])` to every fused tensor."""

    def rule(ranks: list[Tensors]) -> None:
        for rank, tensors in enumerate(ranks):
            for name in [name for name in tensors if ".attention.qkv." in name]:
                tensors[name] = torch.cat(change(rank % tp, qkv_of(tensors[name], tp, groups)))

    return rule


def exchange(first: str, second: str, *, only: str = "") -> Rule:
    """Exchange two tensors in every rank, of the layers whose name contains `only`."""

    def rule(ranks: list[Tensors]) -> None:
        for tensors in ranks:
            for name in [name for name in tensors if first in name and only in name]:
                other = name.replace(first, second)
                tensors[name], tensors[other] = tensors[other], tensors[name]

    return rule


def subtract_one(ranks: list[Tensors]) -> None:
    """Norm weights as the zero-centred model stores them."""
    for tensors in ranks:
        for name in tensors:
            if re.search(r"(layernorm|ln_f)\.weight$", name):
                tensors[name] = tensors[name] - 1


def interleave(rank: int, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Query and key rows paired as neighbours instead of halves."""
    rows = torch.arange(HEAD).reshape(2, -1).T.flatten()
    mixed = [part.reshape(-1, HEAD, *part.shape[1:])[:, rows].reshape(part.shape) for part in parts[:2]]
    return [*mixed, parts[2]]


def swap_ranks(name: str, first: int, second: int) -> Rule:
    """Give two ranks each other's shard of a tensor."""

    def rule(ranks: list[Tensors]) -> None:
        ranks[first][name], ranks[second][name] = ranks[second][name], ranks[first][name]

    return rule


def shift_layers(ranks: list[Tensors]) -> None:
    """From the second layer of this single rank on, every layer is the one after it."""
    (tensors,) = ranks
    before = dict(tensors)
    for name in tensors:
        match = re.match(r"transformer\.layers\.(\d+)\.", name)
        if match and int(match[1]) >= 1:
            following = min(int(match[1]) + 1, 3)
            tensors[name] = before[name.replace(match[0], f"transformer.layers.{following}.")]


def wrong_replicas(ranks: list[Tensors]) -> None:
    """Rank r of four has key/value head r % 2 instead of r // 2."""
    before = [dict(tensors) for tensors in ranks]
    for rank, tensors in enumerate(ranks):
        holder = {0: 0, 1: 2}[rank % 2]
        for name in [name for name in tensors if ".attention.qkv." in name]:
            query = qkv_of(before[rank][name], 4, 2)[0]
            tensors[name] = torch.cat([query, *qkv_of(before[holder][name], 4, 2)[1:]])


def leak_padding(ranks: list[Tensors]) -> None:
    """The table starts one row late, so the last row is one of the padding."""
    for tensors in ranks:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(-1, 0)


TP2 = ("--tp", 2)
FAULTS: dict[str, tuple[dict[str, object], tuple[object, ...], Rule, str]] = {
    "query and key exchanged": (
        GPT,
        TP2,
        change_qkv(lambda _, parts: [parts[1], parts[0], parts[2]], tp=2, groups=8),
        r"the embedding agrees, differ from layer 0, query \(.*\): equals the reference's key: exchanged "
        r"\[transformer.layers.0.attention.qkv \(query rows\) in rank0.safetensors, rank1.safetensors\]",
    ),
    "key and value exchanged": (
        LLAMA,
        TP2,
        change_qkv(lambda _, parts: [parts[0], parts[2], parts[1]], tp=2, groups=2),
        r"differ from layer 0, key \(.*\): equals the reference's value: exchanged",
    ),
    "qkv left group by group": (
        LLAMA,
        ("--tp", 1),
        change_qkv(
            lambda _, p: list(torch.cat([x.reshape(2, -1, *x.shape[1:]) for x in p], 1).flatten(0, 1).split(HEAD)),
            tp=1,
            groups=2,
        ),
        r"differ from layer 0, query \(",
    ),
    "rotary halves interleaved": (
        LLAMA,
        TP2,
        change_qkv(interleave, tp=2, groups=2),
        r"differ from layer 0, query \(.*\): each head has its elements in another order: rotary halves",
    ),
    "query heads in reverse": (
        NEMOTRON,
        TP2,
        change_qkv(lambda _, p: [p[0].reshape(4, HEAD, -1).flip(0).reshape(p[0].shape), *p[1:]], tp=2, groups=2),
        r"differ from layer 0, query \(.*\): the right values in another order: heads or rows are permuted",
    ),
    "key/value heads repeated in the wrong order": (
        LLAMA,
        ("--tp", 4),
        wrong_replicas,
        r"differ from layer 0, key \(.*\): the right values in another order: heads or rows are permuted",
    ),
    "gate and up exchanged": (
        LLAMA,
        TP2,
        exchange("mlp.fc", "mlp.gate"),
        r"differ from layer 0, MLP gate \(.*\): equals the reference's MLP up: exchanged",
    ),
    "gate and up exchanged in one layer": (
        LLAMA,
        ("--tp", 2, "--pp", 2),
        lambda ranks: exchange("mlp.fc", "mlp.gate", only="layers.1.")(ranks[2:]),
        r"agree up to layer 2, differ from layer 3, MLP gate \(.*\): equals the reference's MLP up: exchanged "
        r"\[transformer.layers.1.mlp.fc in rank2.safetensors, rank3.safetensors\]",
    ),
    "the one of zero-centred norms missing": (
        NEMOTRON,
        TP2,
        subtract_one,
        r"differ from layer 0, attention norm \(.*\): off by exactly the normalised input",
    ),
    "layers off by one": (
        LLAMA,
        ("--tp", 1),
        shift_layers,
        r"agree up to layer 0, differ from layer 1, attention norm \(.*\[transformer.layers.1.input_layernorm in rank0",
    ),
    "two layers exchanged": (
        GPT,
        TP2,
        exchange("layers.2.mlp.proj", "layers.3.mlp.proj"),
        r"agree up to layer 1, differ from layer 2, MLP output \(.*\[transformer.layers.2.mlp.proj",
    ),
    "a shard in the wrong rank": (
        LLAMA,
        TP2,
        swap_ranks("transformer.layers.2.attention.dense.weight", 0, 1),
        r"agree up to layer 1, differ from layer 2, attention output \(.*\[transformer.layers.2.attention.dense",
    ),
    "the two norms exchanged": (
        NEMOTRON,
        TP2,
        exchange("input_layernorm", "post_layernorm", only="layers.2"),
        r"agree up to layer 1, differ from layer 2, attention norm \(",
    ),
    "a bias of another layer": (
        GPT,
        TP2,
        exchange("layers.1.mlp.fc.bias", "layers.2.mlp.fc.bias"),
        r"agree up to layer 0, differ from layer 1, MLP up \(",
    ),
    "embedding shards exchanged": (
        NEMOTRON,
        TP2,
        swap_ranks("transformer.vocab_embedding.weight", 0, 1),
        r"the embedding \(.*\) differs",
    ),
    "positions off by one": (
        GPT,
        ("--tp", 1),
        lambda ranks: ranks[0].update(
            {n: t.roll(1, 0) for n, t in ranks[0].items() if n == "transformer.position_embedding.weight"}
        ),
        r"the embedding \(.*\) differs",
    ),
    "vocabulary rows off by one": (LLAMA, TP2, leak_padding, r"hidden states agree, so the output layer is wrong"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_rule_is_located(fault: str, finished: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    source, options, rule, message = FAULTS[fault]
    checkpoint, output = finished(source, *options)
    report = verify_logits(checkpoint, rewrite(output, tmp_path / "faulty", rule), num_tokens=24)
    assert not report.agrees
    assert re.search(message, str(report)), str(report)


CONFIGS = {
    "base": (LLAMA, {"rotary_base": 500000.0}, "right at position 0 and wrong after it"),
    "percentage": (NEMOTRON, {"rotary_pct": 1.0}, "right at position 0 and wrong after it"),
    "pairing": (NEMOTRON, {"position_embedding_type": "rope_gptj"}, "right at position 0 and wrong after it"),
    "activation": (NEMOTRON, {"hidden_act": "relu"}, r"differ from layer 0, MLP activation \("),
    "epsilon": (LLAMA, {"norm_epsilon": 0.1}, r"differ from layer 0, attention norm \("),
    "scaling": (GPT, {"q_scaling": 2.0}, r"differ from layer 0, attention context \("),
}


@pytest.mark.parametrize("field", CONFIGS)
def test_a_wrong_field_of_config_json_is_located(
    field: str, finished: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    source, changes, message = CONFIGS[field]
    checkpoint, output = finished(source, *TP2)
    faulty = rewrite(output, tmp_path / "faulty", lambda ranks: None)
    (faulty / "config.json").write_text(json.dumps({**config_of(output), **changes}))
    assert re.search(message, str(verify_logits(checkpoint, faulty, num_tokens=24)))


HF_FAULTS = {
    "gate and up exchanged": (
        LLAMA,
        exchange("mlp.gate_proj", "mlp.up_proj", only="layers.3."),
        r"agree up to layer 2, differ from layer 3, MLP gate \(.*exchanged \[model.layers.3.mlp.gate_proj\]",
    ),
    "a one too many": (
        NEMOTRON,
        lambda ranks: ranks[0].update({n: t + 1 for n, t in ranks[0].items() if n.endswith("norm.weight")}),
        r"differ from layer 0, attention norm \(.*off by exactly the normalised input",
    ),
    "layers exchanged": (
        NEMOTRON,
        exchange("layers.1.self_attn.v_proj", "layers.2.self_attn.v_proj"),
        r"agree up to layer 0, differ from layer 1, value \(",
    ),
    "query and key exchanged": (
        GPT,
        lambda ranks: ranks[0].update(
            {n: torch.cat([t.chunk(3, -1)[i] for i in (1, 0, 2)], -1) for n, t in ranks[0].items() if "c_attn" in n}
        ),
        r"differ from layer 0, query \(.*equals the reference's key: exchanged",
    ),
}


@pytest.mark.parametrize("fault", HF_FAULTS)
def test_a_wrong_rule_of_the_hugging_face_target_is_located(
    fault: str, finished: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    source, rule, message = HF_FAULTS[fault]
    checkpoint, output = finished(source, "--target", "hf")
    report = verify_logits(checkpoint, rewrite(output, tmp_path / "faulty", rule), num_tokens=24)
    assert not report.agrees
    assert re.search(message, str(report)), str(report)
