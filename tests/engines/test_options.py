"""Engine options: what is accepted, from where, and what does not fit a model. Values only: nothing is built."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.exports import run_command

from dist_export.engines.options import EngineOptions, check, option_flags, parse_assignments, read_options
from dist_export.errors import ExportError
from dist_export.targets.trtllm.build_command import build_command, fitting_options


def config(*, algorithm: str | None = None, cache: str | None = None, tp: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "max_position_embeddings": 4096,
        "quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": cache},
        "mapping": {"world_size": tp, "tp_size": tp},
        **more,
    }


def test_defaults_are_those_of_trtllm_build_and_fit() -> None:
    options = EngineOptions()
    assert (options.max_batch_size, options.max_input_len, options.max_num_tokens) == (None, 1024, 8192)
    assert options.as_values() == {}
    check(options, config(), "0.14")


def test_a_file_and_single_options_that_replace_its(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("max_batch_size: 8\nremove_input_padding: enable\nlora_dir: [a, b]\ngemm_plugin: auto\n")
    options = read_options(file, parse_assignments(["max_batch_size=16", "context_fmha=disable"]))
    assert options == EngineOptions(
        max_batch_size=16, remove_input_padding=True, context_fmha=False, lora_dir=("a", "b"), gemm_plugin="auto"
    )
    assert EngineOptions.of(options.as_values()) == options


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_batch": 1}, "max_batch is unknown; known: max_batch_size"),
        ({"max_batch_size": "many"}, "max_batch_size: 'many' is not a whole number"),
        ({"context_fmha": "maybe"}, "context_fmha: 'maybe' is not enable or disable"),
        ({"max_batch_size": True, "refit": 7}, "(?s)max_batch_size: True.*refit: 7"),
    ],
)
def test_values_that_are_no_options(values: dict[str, object], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        EngineOptions.of(values)


@pytest.mark.parametrize(
    ("options", "of", "release", "message"),
    [
        ({"max_seq_len": 4097}, {}, "0.14", "max_seq_len 4097 is more than the model's 4096 positions"),
        ({"max_input_len": 2000, "max_seq_len": 1000}, {}, "0.14", "max_input_len 2000 is more than max_seq_len 1000"),
        ({"max_batch_size": 0}, {}, "0.14", "max_batch_size is 0, must be at least 1"),
        ({"opt_num_tokens": 9000}, {}, "0.14", "opt_num_tokens 9000 is more than max_num_tokens 8192"),
        ({"opt_num_tokens": 9, "multiple_profiles": True}, {}, "0.14", "exclude each other"),
        ({"user_buffer": True}, {}, "0.12", "user_buffer is an option of TensorRT-LLM 0.16 to 1.2"),
        ({"kv_cache_type": "flat"}, {}, "0.14", "kv_cache_type is flat, expected one of paged, continuous, disabled"),
        ({"gemm_plugin": "float16"}, {}, "0.14", "gemm_plugin is float16, but the export is bfloat16"),
        ({"gemm_plugin": "fp8"}, {}, "0.14", "gemm_plugin fp8 needs weights quantised as FP8, these are None"),
        ({"use_fp8_context_fmha": True}, {}, "0.14", "use_fp8_context_fmha needs weights quantised as FP8"),
        ({"use_paged_context_fmha": True}, {"cache": "INT8"}, "0.14", "does not work with an INT8 KV cache"),
        ({"use_paged_context_fmha": True}, {"cache": "FP8"}, "0.14", "with an FP8 KV cache needs weights quantised"),
        ({"reduce_fusion": True}, {}, "0.14", "with tp above 1, this is LlamaForCausalLM with tp 1"),
        ({"pp_reduce_scatter": True}, {}, "1.0", "pp_reduce_scatter is for MixtralForCausalLM"),
        ({"fast_build": True}, {"algorithm": "W8A16"}, "0.14", "fast_build does not work with weights .* W8A16"),
        ({"weight_streaming": True, "gemm_plugin": "auto"}, {}, "0.14", "weight_streaming needs gemm_plugin disable"),
        ({"lora_dir": ["x"]}, {}, "0.14", "need lora_plugin"),
        ({"strongly_typed": False}, {"algorithm": "FP8"}, "0.14", "strongly_typed cannot be switched off"),
        ({"max_draft_len": 3, "gather_context_logits": True}, {}, "0.14", "exclude each other"),
        ({"max_draft_len": 3}, {}, "0.14", "max_draft_len is given without speculative_decoding_mode"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], of: dict[str, Any], release: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        check(EngineOptions.of(options), config(**of), release)


def test_options_that_fit() -> None:
    check(EngineOptions(gemm_plugin="fp8", use_fp8_context_fmha=True), config(algorithm="FP8", cache="FP8"), "1.2")
    check(EngineOptions(reduce_fusion=True, user_buffer=True), config(tp=2), "1.0")
    check(EngineOptions(kv_cache_type="paged", fast_build=True), config(), "0.12")
    check(EngineOptions(max_seq_len=8192), config(rotary_scaling={"type": "linear", "factor": 2.0}), "0.14")


def test_every_option_is_a_flag() -> None:
    flags = option_flags()
    assert flags["strip_plan"] and not flags["max_batch_size"]
    assert set(flags) == set(EngineOptions.__struct_fields__)


def test_help_tells_of_every_option() -> None:
    process = run_command("engine", "--help")
    assert process.returncode == 0, process.stderr
    shown = re.findall(r"^  --([a-z0-9_]+)", process.stdout, re.MULTILINE)
    assert [name for name in EngineOptions.__struct_fields__ if shown.count(name) != 1] == []
    assert [line for line in process.stdout.splitlines() if len(line) > 100] == []


def test_the_command_says_what_would_otherwise_go_wrong() -> None:
    llama3 = {"type": "llama3", "factor": 8.0}
    assert fitting_options(config(rotary_scaling=llama3)) == {"max_seq_len": "4096", "gemm_plugin": "auto"}
    command = build_command(config(algorithm="FP8", cache="INT8", tp=4), checkpoint="/a")
    assert command == (
        "trtllm-build --checkpoint_dir /a --output_dir ENGINES --max_seq_len 4096 --use_paged_context_fmha disable "
        "--workers 4"
    )
