"""`iterate` over live Megatron-Core models on gloo ranks: the bytes of the export, in buckets within their bound."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import export, raw_bytes, tensors_of
from support.live_configuration import CONFIGURATION, MODEL_FIELDS
from support.live_runs import run_live
from support.small_models import LLAMA, small_model

from dist_export.errors import ExportError
from dist_export.live import iterate
from dist_export.quantization import QuantizationOptions
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm.target import TrtllmOptions
from dist_export.verify.logits import verify_logits

PROGRAM = "live_buckets.py"
VOCABULARY = 250


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if ours[n].dtype != theirs[n].dtype or raw_bytes(ours[n]) != raw_bytes(theirs[n])] == []


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("model*.safetensors") for name, value in tensors_of(path).items()}


def seen(folder: Path, trial: str, rank: int) -> dict[str, Any]:
    return json.loads((folder / "live" / trial / f"seen{rank}.json").read_text())


def assert_within_bound(found: dict[str, Any]) -> None:
    """Buckets and what was received for one (of the same element type) are bounded; no tensor outlives its bucket."""
    assert len(found["buckets"]) > 3
    assert any(len(sizes) > 1 for sizes in found["buckets"])
    assert [sizes for sizes in found["buckets"] if sum(sizes) > found["bound"] and len(sizes) > 1] == []
    assert 0 < found["received"] <= max(sum(sizes) for sizes in found["buckets"])
    assert found["moved"] > found["received"]
    assert found["still_alive"] == 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "run"
    trials = ("buckets_trtllm", "buckets_hf", "buckets_one", "buckets_stopping")
    return run_live(PROGRAM, folder, "--tp", 2, "--pp", 2, "--kv-groups", 2, "--trial", *trials, "--target", 4, 1)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral") / "run"
    model = ("--style", "mixtral", "--ep", 2, "--etp", 1, "--layers", 2)
    return run_live(PROGRAM, folder, *model, "--trial", "buckets_trtllm", "buckets_hf", "--target", 2, 1)


@pytest.mark.parametrize(("model", "num_ranks"), [("llama", 4), ("mixtral", 2)])
def test_trtllm_shards_of_another_layout(
    model: str, num_ranks: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(model)
    exported = export(folder, tmp_path / "out", "--tp", num_ranks, "--vocab-size", VOCABULARY)
    for rank in range(num_ranks):
        name = f"rank{rank}.safetensors"
        assert_equal(tensors_of(folder / "live" / "buckets_trtllm" / name), tensors_of(exported / name))
        assert_within_bound(seen(folder, "buckets_trtllm", rank))


@pytest.mark.parametrize(("model", "num_ranks"), [("llama", 4), ("mixtral", 2)])
def test_hugging_face_tensors_on_every_rank(
    model: str, num_ranks: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(model)
    exported = export(folder, tmp_path / "out", "--target", "hf", "--vocab-size", VOCABULARY)
    for rank in range(num_ranks):
        ours = tensors_of(folder / "live" / "buckets_hf" / f"rank{rank}.safetensors")
        assert_equal(ours, all_tensors(exported))
        assert_within_bound(seen(folder, "buckets_hf", rank))
    orders = [seen(folder, "buckets_hf", rank)["names"] for rank in range(num_ranks)]
    assert all(order == orders[0] for order in orders)
    assert orders[0][0] == "model.embed_tokens.weight"
    layers = [int(match[1]) for name in orders[0] if (match := re.search(r"layers\.(\d+)\.", name))]
    assert layers == sorted(layers)
    assert set(orders[0][-2:]) == {"model.norm.weight", "lm_head.weight"}


def test_state_dicts_and_one_receiver(llama: Path) -> None:
    """What is sent for it is all that moves."""
    one = {rank: tensors_of(llama / "live" / "buckets_one" / f"rank{rank}.safetensors") for rank in range(4)}
    assert_equal(one[1], tensors_of(llama / "live" / "buckets_hf" / "rank1.safetensors"))
    assert_within_bound(seen(llama, "buckets_one", 1))
    for rank in (0, 2, 3):
        assert one[rank] == {}
        assert seen(llama, "buckets_one", rank)["moved"] == 0


def test_a_rank_that_stops_is_named_to_the_others(llama: Path) -> None:
    messages = [(llama / "live" / "buckets_stopping" / f"message{rank}").read_text() for rank in range(4)]
    assert messages[1] == ""
    for rank in (0, 2, 3):
        assert re.search("rank 1 of the group failed, or stopped iterating before the end", messages[rank])


def test_buckets_loaded_into_a_transformers_model_give_megatron_logits(llama: Path, tmp_path: Path) -> None:
    """Bucket by bucket into a model of other weights; Megatron's own GPTModel is the reference."""
    transformers = pytest.importorskip("transformers")
    exported = export(llama, tmp_path / "out", "--target", "hf", "--vocab-size", VOCABULARY)
    config = transformers.AutoConfig.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = tensors_of(llama / "live" / "buckets_hf" / "rank2.safetensors")
    names = iter(seen(llama, "buckets_hf", 2)["names"])
    for sizes in seen(llama, "buckets_hf", 2)["buckets"]:
        missing = model.load_state_dict({(name := next(names)): tensors[name] for _ in sizes}, strict=False)
        assert missing.unexpected_keys == []
    assert model.state_dict().keys() == tensors.keys()
    model.save_pretrained(tmp_path / "loaded")
    report = verify_logits(llama, tmp_path / "loaded", overrides={"vocab_size": (VOCABULARY, "the test")})
    assert report.agrees, str(report)


def one_process(**more: Any) -> list[tuple[str, torch.Tensor]]:
    arguments = {"transformer_config": CONFIGURATION, "model_fields": MODEL_FIELDS, **more}
    target = arguments.pop("target", TrtllmOptions(tp_size=2))
    return list(iterate(arguments.pop("model", small_model(LLAMA).per_layer()), target, **arguments))


def test_one_process_takes_each_target_rank_in_turn() -> None:
    query, key, value = small_model(LLAMA).qkv(1)
    expected = {0: [query[:16], key[:8], value[:8]], 1: [query[16:], key[8:], value[8:]]}
    for rank, parts in expected.items():
        found = dict(one_process(target_rank=rank, bucket_bytes=1))
        assert torch.equal(found["transformer.layers.1.attention.qkv.weight"], torch.cat(parts))


def test_tensors_come_on_the_device_that_is_asked_for() -> None:
    """The meta device stands for a GPU: shapes and types stay, memory does not."""
    here, there = dict(one_process(target_rank=0)), dict(one_process(target_rank=0, device="meta"))
    assert {tensor.device.type for tensor in here.values()} == {"cpu"}
    assert {tensor.device.type for tensor in there.values()} == {"meta"}
    described = [{name: (each.shape, each.dtype) for name, each in found.items()} for found in (here, there)]
    assert described[0] == described[1]


def test_quantised_tensors_do_not_depend_on_the_buckets() -> None:
    """Scales are measured before the first bucket, and follow their weight."""
    options = {"target_rank": 1, "quantization": QuantizationOptions(algorithm="fp8_per_channel")}
    small, whole = (dict(one_process(bucket_bytes=size, **options)) for size in (1, 1 << 20))
    assert list(small) == list(whole)
    assert_equal(small, whole)
    names = list(small)
    proj = "transformer.layers.0.mlp.proj."
    assert small[proj + "weight"].dtype is torch.float8_e4m3fn
    assert names[names.index(proj + "weight") + 1] == proj + "per_channel_scale"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"bucket_bytes": 0}, "bucket_bytes is 0"),
        ({"target_rank": 2}, "asks for target rank 2 of 2"),
        ({"transformer_config": None}, "give transformer_config"),
        ({"model": torch.nn.Linear(2, 2)}, "Linear is neither a GPTModel"),
        ({"model": [], "target": HuggingFaceOptions()}, "no model was given"),
    ],
)
def test_what_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        one_process(**more)
