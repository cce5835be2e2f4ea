"""Calls into TensorRT-LLM, release by release, against signatures recorded from its public source (signatures/).

What takes the calls is a stand-in made from these signatures (support/engine_stand_in.py): arguments, fields and
options that a release does not have fail, and so do values that it does not take.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import engine_stand_in as stand_in
from support.exports import REPOSITORY

from dist_export.engines.options import CHOICES, PLUGIN_FIELDS, SINCE, VALUES_SINCE, EngineOptions, check
from dist_export.errors import ExportError
from dist_export.targets.trtllm.build_command import build_command
from dist_export.targets.trtllm.releases import ALL, RELEASES

CONFIG = {
    "architecture": "LlamaForCausalLM",
    "dtype": "bfloat16",
    "max_position_embeddings": 64,
    "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    "mapping": {"world_size": 2, "tp_size": 2},
}
EVERY_OPTION: dict[str, Any] = {
    "max_batch_size": 4, "max_seq_len": 48, "max_num_tokens": 64, "opt_num_tokens": 8, "max_beam_width": 2,
    "max_prompt_embedding_table_size": 5, "kv_cache_type": "continuous", "logits_dtype": "float16",
    "gather_context_logits": True, "gather_generation_logits": True, "refit": True, "strip_plan": True,
    "weight_sparsity": True, "weight_streaming": True, "fast_build": True, "profiling_verbosity": "detailed",
    "enable_debug_output": True, "output_timing_cache": "cache", "speculative_decoding_mode": "lookahead_decoding",
    "max_draft_len": 2, "lora_plugin": "auto", "lora_dir": ["adapter"], "lora_target_modules": ["attn_q"],
    "gpt_attention_plugin": "bfloat16", "gemm_plugin": "disable", "low_latency_gemm_plugin": "disable",
    "moe_plugin": "disable", "nccl_plugin": "auto", "gemm_swiglu_plugin": "disable", "context_fmha": False,
    "remove_input_padding": False, "use_paged_context_fmha": True, "use_fp8_context_fmha": True,
    "tokens_per_block": 16, "multiple_profiles": True, "reduce_fusion": True, "use_fused_mlp": False,
    "user_buffer": True, "streamingllm": True, "pp_reduce_scatter": True, "input_timing_cache": "cache",
}  # fmt: skip
_PROGRAM = """
import json, pathlib, sys
from dist_export.engines import adapter
from dist_export.engines.options import EngineOptions
from dist_export.errors import ExportError
order = json.loads(sys.stdin.read())
try:
    for options in order["options"]:
        output = pathlib.Path(order["output"])
        adapter.build_rank(pathlib.Path(order["folder"]), order["rank"], EngineOptions.of(options), output)
    if order["weights"]:
        from dist_export.megatron_export.values import RankConfig
        config = RankConfig(json.loads((pathlib.Path(order["folder"]) / "config.json").read_text()), 1)
        adapter.build_from_weights({"lm_head.weight": 0}, config, EngineOptions(), order["output"] + "/memory")
except ExportError as error:
    print(error)
"""


def call(
    folder: Path, recorded: str, *options: dict[str, Any], weights: bool = False, rank: int = 1
) -> tuple[str, list[dict[str, Any]]]:
    """What the adapter says, and the builds that it made with the stand-in for a release."""
    environment = stand_in.install(folder, recorded)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / f"rank{rank}.safetensors").touch()
    order: dict[str, Any] = {"folder": str(folder), "output": str(folder / "engines"), "rank": rank}
    order |= {"options": options, "weights": weights}
    process = subprocess.run(
        [sys.executable, "-c", _PROGRAM], input=json.dumps(order), env={**os.environ, **environment},
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    calls = stand_in.calls_in(folder)
    return process.stdout.strip(), [each["arguments"] for each in calls if each["call"] == "build"]


@pytest.mark.parametrize("recorded", stand_in.RECORDED)
def test_every_call_has_the_arguments_of_the_release(tmp_path: Path, recorded: str) -> None:
    known = {name: value for name, value in EVERY_OPTION.items() if recorded in SINCE.get(name, ALL)}
    said, (plain, everything) = call(tmp_path, recorded, {}, known)
    assert said == ""
    assert (tmp_path / "engines" / "rank1.engine").is_file()
    assert not (tmp_path / "engines" / "config.json").exists()  # rank 0 writes it
    record = stand_in.record_of(recorded)
    assert plain["config"]["max_batch_size"] == (256 if recorded in ("0.12", "0.13") else 2048)
    assert (plain["config"]["max_input_len"], plain["config"]["max_seq_len"]) == (64, 64)
    defaults = record["fields"]["PluginConfig"]
    assert {name: value for name, value in plain["plugin"].items() if value != defaults.get(name, False)} == {}
    assert everything["logits"] == "float16"
    assert (everything["config"]["use_refit"], everything["config"]["use_strip_plan"]) == (True, True)
    assert everything["config"]["speculative_decoding_mode"] == "SpeculativeDecodingMode.LOOKAHEAD_DECODING"
    assert re.search(r"lora_dir'?[=:] ?\['adapter'\]", everything["config"]["lora_config"])
    for name in set(PLUGIN_FIELDS) & set(known):
        expected = None if known[name] == "disable" else known[name]
        if (recorded, name) == ("0.12", "use_fused_mlp"):  # no plugin's then
            assert everything["config"][name] is False
        else:
            assert everything["plugin"][name] == expected, name
    assert everything["plugin"].get("_explicitly_disable_gemm_plugin") in (None, True)
    assert everything["plugin"]["manage_weights"] is True
    if recorded == "0.12":
        assert everything["plugin"]["paged_kv_cache"] is False
    else:
        assert everything["config"]["kv_cache_type"] == "KVCacheType.CONTINUOUS"


def test_every_release_is_recorded() -> None:
    assert stand_in.RECORDED == RELEASES
    assert all(stand_in.record_of(recorded)["origin"] for recorded in RELEASES)


@pytest.mark.parametrize("recorded", ["1.1", "1.2"])
def test_no_timing_cache_is_left_behind(tmp_path: Path, recorded: str) -> None:
    """Fields of 1.2 refuse None: its default stands in config.json, and a file of that name appears nowhere."""
    _, (build,) = call(tmp_path, recorded, {}, rank=0)
    told = json.loads((tmp_path / "engines" / "config.json").read_text())["build_config"]["output_timing_cache"]
    assert told == {"1.1": None, "1.2": "model.cache"}[recorded]
    used = build["config"]["output_timing_cache"]
    assert used is None if recorded == "1.1" else not Path(used).exists()
    assert not (REPOSITORY / "model.cache").exists()


@pytest.mark.parametrize("recorded", ["0.12", "0.13", "0.14", "0.21", "1.2"])
def test_weights_in_memory_are_preprocessed_and_loaded(tmp_path: Path, recorded: str) -> None:
    said, (build,) = call(tmp_path, recorded, weights=True)
    assert (said, build["rank"]) == ("", 1)
    names = [each["arguments"] for each in stand_in.calls_in(tmp_path) if each["call"] == "load"]
    assert names == [{"names": ["lm_head.weight"]}]  # also where preprocess_weights returns nothing


def test_options_that_a_release_lacks_are_named(tmp_path: Path) -> None:
    said, builds = call(tmp_path, "0.12", {"user_buffer": True, "low_latency_gemm_plugin": "fp8"})
    assert said == "the installed TensorRT-LLM has no build option low_latency_gemm_plugin, user_buffer"
    assert builds == []


@pytest.mark.parametrize("recorded", RELEASES)
def test_every_option_is_a_flag_of_trtllm_build_with_its_default(recorded: str) -> None:
    record = stand_in.record_of(recorded)
    flags = {name: _default(default, record) for name, default in record["options"].items()}
    ours = {name for name in EngineOptions.__struct_fields__ if recorded in SINCE.get(name, ALL)}
    missing = ours - flags.keys() - set(record["plugin_options"])
    assert missing - {"kv_cache_type"} == {"refit", "strongly_typed"}  # always off and always on there
    assert ("kv_cache_type" in missing) == (recorded == "0.12")  # there as --paged_kv_cache
    absent = [name for name in SINCE if recorded not in SINCE[name] and name != "streamingllm"]
    assert not set(absent) & {*flags, *record["plugin_options"]}
    different = {name for name in ours & flags.keys() if getattr(EngineOptions(), name) not in (flags[name], None, ())}
    assert different == set()  # None and (): the release's own


def _default(default: object, record: dict[str, Any]) -> object:
    """A recorded default; those of BuildConfig are looked up."""
    found = re.fullmatch(r"BuildConfig\.(?:model_fields\[')?(\w+)(?:'\]\.default)?", str(default))
    return record["fields"]["BuildConfig"][found[1]] if found else default


@pytest.mark.parametrize("recorded", RELEASES)
def test_values_of_plugins_are_those_of_the_release(recorded: str) -> None:
    choices = stand_in.record_of(recorded)["choices"]
    for name in (name for name in CHOICES if name.endswith("_plugin") and recorded in SINCE.get(name, ALL)):
        known = {value or "disable" for value in choices.get(name, choices["default"])} - {"int32"}
        ours = {value for value in CHOICES[name] if recorded in VALUES_SINCE.get((name, value), ALL)}
        assert ours == known, name


@pytest.mark.parametrize("recorded", RELEASES)
@pytest.mark.parametrize(("algorithm", "cache"), [(None, None), (None, "INT8"), ("FP8", "FP8"), ("W4A16", "FP8")])
def test_the_printed_command_has_flags_and_values_of_the_release(
    recorded: str, algorithm: str | None, cache: str | None
) -> None:
    record = stand_in.record_of(recorded)
    quantization = {"quant_algo": algorithm, "kv_cache_quant_algo": cache}
    words = shlex.split(build_command({**CONFIG, "quantization": quantization}, checkpoint="/x"))
    assert words[0] == "trtllm-build"
    for flag, value in zip(words[1::2], words[2::2], strict=True):
        name = flag.removeprefix("--")
        assert name in record["options"] or name in record["plugin_options"], flag
        if name.endswith("_plugin"):
            assert value in record["choices"].get(name, record["choices"]["default"])
        elif record["fields"]["PluginConfig"].get(name) in (True, False):
            assert value in ("enable", "disable")


@pytest.mark.parametrize(
    ("options", "release", "message"),
    [
        ({"streamingllm": True}, "1.1", "streamingllm is an option of TensorRT-LLM 0.12 to 1.0"),
        ({"kv_cache_type": "disabled"}, "0.12", "kv_cache_type disabled is known to TensorRT-LLM 0.13 to 1.2"),
        ({"log_level": "trace"}, "0.21", "log_level trace is known to TensorRT-LLM 1.1 to 1.2"),
    ],
)
def test_what_a_release_does_not_know_is_refused(options: dict[str, Any], release: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        check(EngineOptions.of(options), CONFIG, release)
