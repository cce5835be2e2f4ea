"""``--base``: adapters merged while exporting are the export of a checkpoint that torch merged, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import (
    CANONICAL,
    ITERATION,
    LORA,
    added,
    lora,
    merged,
    product,
    read_torch_dist,
    rewritten,
    write_bridge_adapters,
    write_nemo2_adapters,
)
from support.exports import export, run_command
from support.torch_dist import grid_chunks, megatron_chunks, write_torch_dist

from dist_export.checkpoint.open import open_checkpoint

CONFORMANCE = Path(__file__).parent / "conformance" / "checkpoints"
LLAMA, MIXTRAL = (CONFORMANCE / name for name in ("llama_core_0_16_tp2pp2", "mixtral_core_0_16_pp2ep2"))
BOTH = ("--target", "trtllm", "--target", "hf", "--tp", 2, "--pp", 2)
Tensors = dict[str, torch.Tensor]


def real(checkpoint: Path) -> Tensors:
    return read_torch_dist(checkpoint / "iter_0000010")


def files_of(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in sorted(output.rglob("*.safetensors"))}


def check(base: Path, adapters: Path, expected: Tensors, tmp_path: Path, *arguments: object) -> Path:
    """Export with --base, and the merged checkpoint without; the files are the same and verify says so."""
    wanted = export(rewritten(base / "iter_0000010", expected, tmp_path / "merged"), tmp_path / "wanted", *arguments)
    found = export(adapters, tmp_path / "found", "--base", base, *arguments)
    assert files_of(found) == files_of(wanted)
    report = run_command("verify", adapters, found)
    assert report.returncode == 0, report.stdout + report.stderr
    return found


def test_lora_on_every_dense_weight(tmp_path: Path) -> None:
    base, adapters = real(LLAMA), lora(real(LLAMA))
    top = write_bridge_adapters(tmp_path / "lora", adapters, chunks=megatron_chunks(tp=2, pp=2), tp=2)
    found = check(LLAMA, top, merged(base, adapters, alpha=10), tmp_path, *BOTH)
    manifest = json.loads((found / "hf" / "export_manifest.json").read_text())
    assert manifest["source"]["iteration"] == ITERATION
    assert manifest["request"]["base"] == str(LLAMA.absolute())
    # The bytes of A and B are among those to read.
    plans = [
        json.loads(run_command("plan", *source, "--json").stdout)["targets"][0]["files"][0]["bytes_read"]
        for source in ((LLAMA,), (top, "--base", LLAMA))
    ]
    assert plans[1] - plans[0] == sum(t.nbytes for t in adapters.values())


@pytest.mark.parametrize("num_processes, threads, memory", [(1, 1, "1g"), (3, 2, "1m"), (2, 4, "256k")])
def test_bytes_do_not_depend_on_processes_threads_and_tiles(
    num_processes: int, threads: int, memory: str, tmp_path: Path
) -> None:
    adapters = lora(real(LLAMA), dtype=torch.float32)
    top = write_nemo2_adapters(tmp_path / "lora", adapters)
    expected = merged(real(LLAMA), adapters, alpha=10)
    more = ("--num-processes", num_processes, "--num-threads", threads, "--host-memory", memory)
    check(LLAMA, top, expected, tmp_path, "--tp", 2, *more)


def test_experts_with_an_adapter_each_shared_and_shared_on_one_side(tmp_path: Path) -> None:
    base = real(MIXTRAL)
    modules = ("self_attention.linear_qkv", "mlp.router")
    fc1, fc2 = "mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2"
    each = lora(base, (*modules, fc1, fc2))
    outer = {  # SharedOuterGroupedExpertAdapter: A of fc1 and B of fc2 are those of all experts
        name: t[:, 0] if name in (f"decoder.layers.{fc1}.adapter.linear_in.weight",
                                  f"decoder.layers.{fc2}.adapter.linear_out.weight") else t
        for name, t in each.items()
    }  # fmt: skip
    shared = {name: t[:, 0] if "experts" in name else t for name, t in each.items()}
    for number, adapters in enumerate((each, outer, shared)):
        folder = tmp_path / str(number)
        top = write_bridge_adapters(folder / "lora", adapters)
        check(MIXTRAL, top, merged(base, adapters, alpha=10), folder, "--tp", 2, "--moe-ep", 2)


def canonical(base: Tensors, *, groups: int, blocks: int, tp: int) -> tuple[Tensors, Tensors]:
    """(adapters as they are saved by tp ranks, merged tensors). q, k and v follow one another `blocks` times."""
    generator, saved, result = torch.Generator().manual_seed(9), {}, dict(base)
    name = "decoder.layers.self_attention.linear_qkv"
    weight = base[f"{name}.weight"]
    num_layers, rows, hidden = weight.shape
    size = rows // (groups * 6)  # four heads per group, k, v
    updates = {}
    for part, heads in (("q", 4), ("k", 1), ("v", 1)):
        a = torch.randn(num_layers, 4, hidden, generator=generator).bfloat16()
        b = torch.randn(num_layers, heads * groups * size, 4, generator=generator).bfloat16()
        saved |= {f"{name}.adapter.adapter_{part}.linear_in.weight": a}
        saved |= {f"{name}.adapter.adapter_{part}.linear_out.weight": b}
        updates[part] = product(a, b).unflatten(1, (blocks, -1))
    update = torch.cat([updates[part] for part in "qkv"], 2).flatten(1, 2)
    result[f"{name}.weight"] = added(weight, update, alpha=10, rank=4)
    name = "decoder.layers.mlp.linear_fc1"
    weight, halves = base[f"{name}.weight"], []
    for part in ("gate", "up"):
        a = torch.randn(num_layers, 4, hidden, generator=generator).bfloat16()
        b = torch.randn(num_layers, weight.shape[1] // 2, 4, generator=generator).bfloat16()
        halves.append(product(a, b))
        # apply_swiglu_sharded_factory: the first halves of all ranks, then the second ones
        apart = b.unflatten(1, (tp, 2, -1)).transpose(1, 2).flatten(1, 3).contiguous()
        saved |= {f"{name}.adapter.adapter_{part}.linear_in.weight": a}
        saved |= {f"{name}.adapter.adapter_{part}.linear_out.weight": apart}
    result[f"{name}.weight"] = added(weight, torch.cat(halves, 1), alpha=10, rank=4)
    return saved, result


def as_saved(tp: int) -> Callable[..., Any]:
    """Chunks of tp ranks: two per rank for linear_fc1."""
    return grid_chunks(
        lambda name, tensor: (4, 1 if "linear_in" in name else 2 * tp if "linear_fc1" in name else tp, 1)
    )


@pytest.mark.parametrize("trainer, tp", [("bridge", 1), ("bridge", 2), ("nemo2", 1), ("nemo2", 2)])
def test_canonical_lora(trainer: str, tp: int, tmp_path: Path) -> None:
    """llama_core_0_16_tp2pp2 has two query groups: NeMo 2 adds q, k, v per tp rank, Megatron-Bridge per group."""
    blocks = 2 if trainer == "bridge" else tp
    adapters, expected = canonical(real(LLAMA), groups=2, blocks=blocks, tp=tp)
    if trainer == "bridge":
        top = write_bridge_adapters(tmp_path / "lora", adapters, peft=CANONICAL, chunks=as_saved(tp))
    else:
        top = write_nemo2_adapters(tmp_path / "lora", adapters, lora=CANONICAL, chunks=as_saved(tp))
    check(LLAMA, top, expected, tmp_path, "--tp", 2)


def test_an_mlp_without_gate_saved_in_halves(tmp_path: Path) -> None:
    base = CONFORMANCE / "gpt2_core_0_16_tp2"
    weights = real(base)
    natural = lora(weights, ("mlp.linear_fc1",))
    name = "decoder.layers.mlp.linear_fc1.adapter.linear_out.weight"
    apart = natural[name].unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1, 3).contiguous()
    saved = {**natural, name: apart}
    expected = merged(weights, natural, alpha=10)
    layers = natural[name].shape[0]

    def cut(parts: int) -> Any:
        return grid_chunks(lambda name, tensor: (layers, parts if "linear_out" in name else 1, 1))

    for number, top in enumerate(
        (
            write_nemo2_adapters(tmp_path / "nemo", saved, chunks=cut(4)),
            write_bridge_adapters(tmp_path / "early", saved, chunks=cut(4), tp=2),
            write_bridge_adapters(tmp_path / "late", natural, chunks=cut(2), tp=2),
        )
    ):
        check(base, top, expected, tmp_path / str(number), "--target", "hf")
    unclear = write_bridge_adapters(tmp_path / "unclear", natural, chunks=cut(1), tp=2)
    process = run_command("plan", unclear, "--base", base)
    assert process.returncode == 2
    assert "is saved in 1 chunks of rows" in process.stderr


def test_adapters_in_the_checkpoint_of_the_model_itself(tmp_path: Path) -> None:
    base, adapters = real(LLAMA), lora(real(LLAMA))
    top = write_bridge_adapters(tmp_path / "whole", {**base, **adapters})
    arguments = dict(open_checkpoint(LLAMA).arguments or {})
    import yaml

    path = top / "iter_0000020" / "run_config.yaml"
    document = yaml.safe_load(path.read_text())
    plain = {k: v for k, v in arguments.items() if isinstance(v, str | int | float | None)}
    activation = {"activation_func": "silu", "gated_linear_unit": True, "share_embeddings_and_output_weights": False}
    document["model"] = {**document["model"], **plain, **activation, "tensor_model_parallel_size": 1}
    path.write_text(yaml.safe_dump(document))
    wanted = export(
        rewritten(LLAMA / "iter_0000010", merged(base, adapters, alpha=10), tmp_path / "merged"), tmp_path / "wanted"
    )
    assert files_of(export(top, tmp_path / "found")) == files_of(wanted)


def test_a_wrong_byte_and_another_scale_are_found(tmp_path: Path) -> None:
    adapters = lora(real(LLAMA))
    top = write_bridge_adapters(tmp_path / "lora", adapters)
    output = export(top, tmp_path / "out", "--base", LLAMA, "--target", "hf")
    moved = shutil.copytree(LLAMA, tmp_path / "moved")
    assert run_command("verify", top, output, "--base", moved, "--levels", "rebuild").returncode == 0
    path = top / f"iter_{ITERATION:07d}" / "run_config.yaml"
    path.write_text(path.read_text().replace("alpha: 10", "alpha: 11"))
    process = run_command("verify", top, output, "--levels", "rebuild")
    assert process.returncode == 4
    assert "elements differ from decoder.layers.mlp.linear_fc1.weight[0]" in process.stdout
    assert "layernorm" not in process.stdout


def without(adapters: Tensors, ending: str) -> Tensors:
    return {name: t for name, t in adapters.items() if not name.endswith(ending)}


FC2 = "decoder.layers.mlp.linear_fc2"
FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any] | None, str]] = {
    "no base tensor": (
        lambda t: {name.replace("linear_fc2", "linear_fc3"): each for name, each in t.items()}, LORA,
        r"decoder.layers.0.mlp.linear_fc3: has an adapter, but the base has no decoder.layers.0.mlp.linear_fc3.weight",
    ),
    "layers that the base lacks": (
        lambda t: {name: torch.cat([each, each]) for name, each in t.items()}, LORA,
        r"the base has no decoder.layers.4.",
    ),
    "another width": (
        lambda t: {**t, f"{FC2}.adapter.linear_in.weight": torch.zeros(4, 4, 96)}, LORA,
        r"linear_in \[4, 96\] and linear_out \[64, 4\] does not fit the base's weight \[64, 128\]",
    ),
    "other rows": (
        lambda t: {**t, f"{FC2}.adapter.linear_out.weight": torch.zeros(4, 32, 4)}, LORA,
        r"linear_out of its adapter has 32 rows, expected 64",
    ),
    "one matrix": (lambda t: without(t, "fc2.adapter.linear_out.weight"), LORA, r"its adapter has no linear_out"),
    "another rank": (lambda t: t, {**LORA, "dim": 8}, r"an adapter of rank 4, .*run_config.yaml says dim 8"),
    "two for one": (
        lambda t: {**t, **{f"decoder.layers.mlp.linear_fc1.adapter.adapter_up.linear_{side}.weight":
                   torch.zeros(4, *shape) for side, shape in {"in": (4, 64), "out": (128, 4)}.items()}}, LORA,
        r"linear_fc1.weight\[0\]: two adapters for the same rows|in 1 chunks",
    ),
    "DoRA": (
        lambda t: {**t, f"{FC2}.adapter.weight_magnitude": torch.zeros(4, 64)}, LORA, r"DoRA adapters rescale the rows",
    ),
    "DoRA by its name": (
        lambda t: t, {**LORA, "_target_": "megatron.bridge.peft.dora.DoRA"}, r"peft is megatron.bridge.peft.dora.DoRA",
    ),
    "no scale": (lambda t: t, None, r"says nothing of the adapters .*peft is None"),
    "no alpha": (lambda t: t, {**LORA, "alpha": None}, r"has alpha None and dim 4"),
    "another kind of tensor": (
        lambda t: {**t, f"{FC2}.adapter.gamma": torch.zeros(4, 64)}, LORA, r"adapter.gamma: not the name of a LoRA",
    ),
    "weights beside": (
        lambda t: {**t, "output_layer.weight": torch.zeros(8, 8)}, LORA, r"weights beside its adapters \(1 tensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_an_error(fault: str, tmp_path: Path) -> None:
    from dist_export.api import Source, open_model
    from dist_export.errors import ExportError

    change, peft, message = FAULTS[fault]
    top = write_bridge_adapters(tmp_path / "lora", change(lora(real(LLAMA))), peft=peft)
    with pytest.raises(ExportError, match=message):
        open_model(Source(checkpoint=top, base=LLAMA))


def test_bases_that_are_missing_or_not_wanted(tmp_path: Path) -> None:
    from dist_export.errors import ExportError

    top = write_bridge_adapters(tmp_path / "lora", lora(real(LLAMA)))
    with pytest.raises(ExportError, match=r"holds only adapter weights \(8 tensors.*--base"):
        open_checkpoint(top)
    with pytest.raises(ExportError, match=r"--base .*holds adapters itself"):
        open_checkpoint(top, base=top)
    with pytest.raises(ExportError, match=r"is given, but this checkpoint holds no adapters"):
        open_checkpoint(LLAMA, base=LLAMA)
    with pytest.raises(ExportError, match=r"--base and --master-weights exclude each other"):
        open_checkpoint(top, base=LLAMA, master_weights=True)


def test_query_adapters_of_an_unknown_release(tmp_path: Path) -> None:
    from dist_export.api import Source, open_model
    from dist_export.errors import ExportError

    early = {name: value for name, value in CANONICAL.items() if name != "normalize_moe_lora"}
    adapters, _ = canonical(real(LLAMA), groups=2, blocks=2, tp=1)
    top = write_bridge_adapters(tmp_path / "lora", adapters, peft=early, chunks=as_saved(1))
    with pytest.raises(ExportError, match=r"depends on the release of the trainer.*2 query groups.*on 1 tensor"):
        open_model(Source(checkpoint=top, base=LLAMA))
    adapters, expected = canonical(real(LLAMA), groups=2, blocks=2, tp=2)  # one group per rank: both are the same
    top = write_bridge_adapters(tmp_path / "two", adapters, peft=early, chunks=as_saved(2))
    check(LLAMA, top, expected, tmp_path, "--tp", 2)


def test_gate_and_up_under_two_names(tmp_path: Path) -> None:
    """``singleton_local_shards``: ``weight_w`` and ``weight_v`` per layer take their halves of the update."""
    base, adapters = real(LLAMA), lora(real(LLAMA))
    apart: Tensors = {}
    for name, tensor in base.items():
        head, _, rest = name.partition("decoder.layers.")
        for layer in range(4) if rest else ():
            key, each = f"{head}decoder.layers.{layer}.{rest}", tensor[layer].clone()
            halves = each.chunk(2) if rest == "mlp.linear_fc1.weight" else ()
            apart |= {f"{key}_{half}": part.clone() for half, part in zip("wv", halves, strict=False)}
            apart |= {} if halves else {key: each}
        apart |= {} if rest else {name: tensor}
    singleton = rewritten(LLAMA / "iter_0000010", apart, tmp_path / "singleton")
    top = write_bridge_adapters(tmp_path / "lora", adapters)
    merged_base = rewritten(LLAMA / "iter_0000010", merged(base, adapters, alpha=10), tmp_path / "merged")
    cache = ("--index-cache", tmp_path / "cache")
    wanted = files_of(export(merged_base, tmp_path / "wanted", "--tp", 2))
    assert files_of(export(top, tmp_path / "found", "--base", singleton, "--tp", 2, *cache)) == wanted
    assert (tmp_path / "cache").stat().st_size > 1000
    assert files_of(export(top, tmp_path / "again", "--base", singleton, "--tp", 2, *cache)) == wanted


def test_a_base_in_another_format(tmp_path: Path) -> None:
    """Its chunks are no records, those of the adapters are."""
    base = CONFORMANCE / "llama_legacy_core_0_16_pp2vpp2"
    adapters = lora(real(LLAMA))
    top = write_bridge_adapters(tmp_path / "lora", adapters)
    wanted = merged(real(LLAMA), adapters, alpha=10)
    plain = write_torch_dist(tmp_path / "plain", wanted, args=None)
    shutil.copy(LLAMA / "iter_0000010" / "common.pt", plain / "common.pt")
    found = export(top, tmp_path / "found", "--base", base, "--target", "hf")
    assert files_of(found) == files_of(export(plain, tmp_path / "wanted", "--target", "hf"))
