"""Live Megatron-Core models on gloo ranks, converted in memory: byte for byte what the export of their files is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.exports import export, raw_bytes, tensors_of
from support.live_runs import run_live

PROGRAM = "live_models.py"
VOCABULARY = 250


def assert_same(live: Path, exported: Path, *, with_config: bool = True) -> None:
    files = sorted(path.name for path in exported.glob("rank*.safetensors"))
    assert sorted(path.name for path in live.glob("rank*.safetensors")) == files
    for name in files:
        ours, theirs = tensors_of(live / name), tensors_of(exported / name)
        assert ours.keys() == theirs.keys()
        different = [n for n in ours if ours[n].dtype != theirs[n].dtype or raw_bytes(ours[n]) != raw_bytes(theirs[n])]
        assert different == [], name
    if with_config:
        configs = [json.loads((folder / "config.json").read_text()) for folder in (live, exported)]
        assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("model", "trials", "target"),
    [
        # virtual stages, fewer KV heads (2) than target tp (4), and rounds of 16 KiB
        (
            ("--tp", 2, "--pp", 2, "--vpp", 2, "--kv-groups", 2),
            ("plain", "sharded", "other_layout", "small_rounds"),
            (4, 1),
        ),
        (("--style", "mixtral", "--ep", 2, "--etp", 1, "--layers", 2), ("plain", "sharded", "other_layout"), (2, 1)),
        (("--style", "gpt", "--tp", 2, "--pp", 2, "--layers", 2), ("plain", "converter"), (2, 2)),
        (("--style", "nemotron", "--layers", 2), ("single", "sharded"), (2, 2)),
    ],
    ids=["llama-tp2-pp2-vpp2", "mixtral-ep2", "gpt-tp2-pp2", "nemotron-one-process"],
)
def test_a_live_model_becomes_the_files_of_its_export(
    tmp_path: Path, model: tuple[object, ...], trials: tuple[str, ...], target: tuple[int, int]
) -> None:
    folder = run_live(PROGRAM, tmp_path / "run", *model, "--trial", *trials, "--target", *target)
    layouts = {"other_layout": target, "small_rounds": target, "single": target}
    sizes = dict(zip(model[::2], model[1::2], strict=True))
    own = (sizes.get("--tp", 1), sizes.get("--pp", 1))
    exports: dict[tuple[object, object], Path] = {}
    for trial in trials:
        tp, pp = layouts.get(trial, own)
        if (tp, pp) not in exports:
            output = tmp_path / f"tp{tp}pp{pp}"
            exports[tp, pp] = export(folder, output, "--tp", tp, "--pp", pp, "--vocab-size", VOCABULARY)
        assert_same(folder / "live" / trial, exports[tp, pp], with_config=trial != "converter")
    if "small_rounds" in trials:
        received = [int(path.read_text()) for path in (folder / "live" / "small_rounds").glob("most*")]
        assert len(received) == 4
        assert 0 < max(received) <= 16 << 10


def test_fp8_over_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    """Scales of weights are of all tp ranks together, those of layers find their stage, and casts are the same."""
    one = run_live(PROGRAM, tmp_path / "one", "--trial", "fp8", "--target", 2, 2) / "live" / "fp8"
    many = run_live(PROGRAM, tmp_path / "many", "--tp", 2, "--pp", 2, "--trial", "fp8", "fp8_scales") / "live"
    assert_same(many / "fp8", one)
    for rank in range(4):
        given, whole = (tensors_of(folder / f"rank{rank}.safetensors") for folder in (many / "fp8_scales", one))
        assert whole.keys() - given.keys() == {name for name in whole if "kv_cache" in name or "cache_scaling" in name}
        assert [name for name in given if raw_bytes(given[name]) != raw_bytes(whole[name])] == []
        assert given["transformer.layers.0.mlp.fc.weight"].dtype.itemsize == 1
