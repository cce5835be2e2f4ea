"""Calls into TensorRT-LLM, release by release, against signatures recorded from its public source (signatures/).

What takes the calls is a stand-in made from these signatures (support/engine_stand_in.py): arguments, fields and
options that a release does not have fail. Releases of which no source was at hand, 0.18 to 0.21, lie between two that
were.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import engine_stand_in as stand_in
from support.exports import REPOSITORY

from dist_export.engines.options import PLUGIN_FIELDS, SINCE, EngineOptions
from dist_export.targets.trtllm.releases import ALL

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
        adapter.build_rank(pathlib.Path(order["folder"]), 1, EngineOptions.of(options), pathlib.Path(order["output"]))
    if order["weights"]:
        from dist_export.megatron_export.values import RankConfig
        config = RankConfig(json.loads((pathlib.Path(order["folder"]) / "config.json").read_text()), 1)
        adapter.build_from_weights({"lm_head.weight": 0}, config, EngineOptions(), order["output"] + "/memory")
except ExportError as error:
    print(error)
"""


def call(
    folder: Path, recorded: str, *options: dict[str, Any], weights: bool = False
) -> tuple[str, list[dict[str, Any]]]:
    """What the adapter says, and the builds that it made with the stand-in for a release."""
    environment = stand_in.install(folder, recorded)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "rank1.safetensors").touch()
    order = {"folder": str(folder), "output": str(folder / "engines"), "options": options, "weights": weights}
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
    record = json.loads((stand_in.SIGNATURES / f"{recorded}.json").read_text())
    assert plain["config"]["max_batch_size"] == 2048
    assert (plain["config"]["max_input_len"], plain["config"]["max_seq_len"]) == (64, 64)
    defaults = record["fields"]["PluginConfig"]
    assert {name: value for name, value in plain["plugin"].items() if value != defaults[name]} == {}
    assert everything["logits"] == "float16"
    assert (everything["config"]["use_refit"], everything["config"]["use_strip_plan"]) == (True, True)
    assert everything["config"]["speculative_decoding_mode"] == "SpeculativeDecodingMode.LOOKAHEAD_DECODING"
    assert "'lora_dir': ['adapter']" in everything["config"]["lora_config"]
    for name in set(PLUGIN_FIELDS) & set(known):
        expected = None if known[name] == "disable" else known[name]
        assert everything["plugin"][name] == expected, name
    if recorded != "0.12":
        assert everything["config"]["kv_cache_type"] == "KVCacheType.CONTINUOUS"
        assert everything["plugin"]["manage_weights"] is True


@pytest.mark.parametrize("recorded", ["0.12", "0.13", "0.14", "0.17"])
def test_weights_in_memory_are_preprocessed_and_loaded(tmp_path: Path, recorded: str) -> None:
    said, (build,) = call(tmp_path, recorded, weights=True)
    assert (said, build["rank"]) == ("", 1)
    names = [each["arguments"] for each in stand_in.calls_in(tmp_path) if each["call"] == "load"]
    assert names == [{"names": ["lm_head.weight"]}]  # also where preprocess_weights returns nothing


def test_options_that_a_release_lacks_are_named(tmp_path: Path) -> None:
    said, builds = call(tmp_path, "0.12", {"user_buffer": True, "fast_build": True})
    assert said == "the installed TensorRT-LLM has no build option user_buffer, manage_weights"
    assert builds == []


@pytest.mark.parametrize("name", sorted(SINCE))
def test_since_when_an_option_is_there(name: str) -> None:
    """The table of the product is what was recorded."""
    field = {"fast_build": "manage_weights"}.get(name, name)
    for recorded in stand_in.RECORDED:
        fields = json.loads((stand_in.SIGNATURES / f"{recorded}.json").read_text())["fields"]
        there = field in fields["PluginConfig"] or field in fields["BuildConfig"]
        if (name, recorded) != ("use_fused_mlp", "0.12"):  # a field of BuildConfig then, for which no plugin asks
            assert there == (recorded in SINCE[name]), recorded


def test_names_and_defaults_are_those_of_trtllm_build() -> None:
    """Options that are no plugin's, in a release whose command line has the defaults written out."""
    flags = json.loads((stand_in.SIGNATURES / "0.14.json").read_text())["options"]
    ours = {name for name in EngineOptions.__dataclass_fields__ if name not in PLUGIN_FIELDS}
    assert ours - flags.keys() == {"refit", "strongly_typed"}  # always off and always on there
    different = {name for name in ours & flags.keys() if getattr(EngineOptions(), name) not in (flags[name], ())}
    assert different == {"kv_cache_type", "output_timing_cache", "workers"}  # said in EngineOptions
