"""The engine adapter against TensorRT-LLM's own Python of 0.14, up to the call of ``build()``. Not run in CI.

    TRTLLM_SRC=…/tensorrt_llm python tests/engines/check_with_tensorrt_llm_source.py BOOT_FOLDER EXPORT …

or on exports that it makes itself, tests/engines/test_with_tensorrt_llm_source.py.

TRTLLM_SRC is the ``tensorrt_llm`` folder of a source checkout of 0.14; BOOT_FOLDER holds a ``boot.py`` that makes it
importable without TensorRT, CUDA and compiled bindings. For every rank of every export run, with the real classes:
``PretrainedConfig.from_json_file``, ``set_rank``, ``MODEL_MAP``, ``from_checkpoint`` (which checks names and shapes),
``BuildConfig`` and ``PluginConfig`` with their checks of assigned values, and what ``build()`` itself does before a
network is made: ``update_kv_cache_type`` and ``_init_max_seq_len``. Only ``build()`` is a stand-in, which notes its
arguments, and so is the enumeration ``KVCacheType`` of the compiled bindings.

The same ranks go through ``preprocess_weights``, ``from_config`` and ``load`` as weights in memory.

Result with 0.14.0.dev2024100800: all 14 ranks of four exports of real Megatron-Core models (Llama with 2 KV heads at
tp 4 and at tp 2 pp 2, Mixtral at tp 2 with moe ep 2, GPT with tied embeddings at tp 2 pp 2) load and take every set of
options; of an export with a tensor taken out, that rank fails with the loader's "Required but not provided tensors".
"""

from __future__ import annotations

import copy
import enum
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"max_batch_size": 4, "max_seq_len": 32, "kv_cache_type": "paged", "gemm_plugin": "auto", "refit": True},
    {"kv_cache_type": "continuous", "remove_input_padding": "disable", "context_fmha": "disable", "strip_plan": True},
    {"tokens_per_block": 32, "use_paged_context_fmha": "enable", "multiple_profiles": "enable", "fast_build": True},
    {"speculative_decoding_mode": "lookahead_decoding", "max_draft_len": 3, "logits_dtype": "float16"},
    {"lora_plugin": "auto", "lora_dir": "", "lora_target_modules": "attn_q,attn_v", "weight_sparsity": True},
)


class KVCacheType(enum.Enum):
    """As the compiled bindings have it."""

    CONTINUOUS, PAGED, DISABLED = "continuous", "paged", "disabled"


def main(boot_folder: str, *exports: str) -> int:
    sys.path.insert(0, boot_folder)
    import boot  # noqa: F401  makes tensorrt_llm importable
    import tensorrt_llm.bindings as bindings

    bindings.KVCacheType = KVCacheType
    import tensorrt_llm.builder as builder

    builder.KVCacheType = KVCacheType
    noted: list[tuple[Any, Any]] = []

    def build(model: Any, build_config: Any) -> Any:
        noted.append((model, build_config))
        return SimpleNamespace(engine=b"", config=SimpleNamespace(build_config=build_config), save=lambda folder: None)

    builder.build = build
    failed = 0
    for folder in map(Path, exports):
        world_size = json.loads((folder / "config.json").read_text())["mapping"]["world_size"]
        for rank in range(world_size):
            try:
                told = _check_rank(folder, rank, noted, builder)
            except Exception as error:
                failed += 1
                told = f"FAILED: {type(error).__name__}: {error}"
            print(f"{folder} rank {rank}: {told}")
    return min(failed, 99)


def _check_rank(folder: Path, rank: int, noted: list[tuple[Any, Any]], builder: Any) -> str:
    from dist_export.engines import adapter
    from dist_export.engines.options import EngineOptions, check

    adapter._release = lambda: "0.14"  # nothing is installed that would say it
    values = json.loads((folder / "config.json").read_text())
    for options in OPTIONS:
        chosen = EngineOptions.of({"log_level": "error", **options})
        check(chosen, values, "0.14")
        noted.clear()
        with tempfile.TemporaryDirectory() as output:
            adapter.build_rank(folder, rank, chosen, Path(output))
        (model, config), *others = noted
        assert not others, "built twice"
        _check_build(model, config, chosen, rank, builder)
    _check_in_memory(folder, rank, values, noted, builder)
    return f"{type(model).__name__}, {len(dict(model.named_parameters()))} parameters, {len(OPTIONS)} sets of options"


def _check_in_memory(
    folder: Path, rank: int, values: dict[str, Any], noted: list[tuple[Any, Any]], builder: Any
) -> None:
    from safetensors.torch import load_file

    from dist_export.engines import adapter
    from dist_export.engines.options import EngineOptions

    noted.clear()
    options = EngineOptions(log_level="error")
    with tempfile.TemporaryDirectory() as output:
        weights = load_file(folder / f"rank{rank}.safetensors")
        config = SimpleNamespace(
            values=values, to_pretrained_config=lambda: adapter.pretrained_config(copy.deepcopy(values), rank)
        )
        adapter.build_from_weights(weights, config, options, output)
    ((model, config),) = noted
    _check_build(model, config, options, rank, builder)


def _check_build(model: Any, config: Any, options: Any, rank: int, builder: Any) -> None:
    assert model.config.mapping.rank == rank, model.config.mapping.rank
    if options.logits_dtype is not None:
        assert model.config.logits_dtype == options.logits_dtype
    initialised = ("embed_positions", "rotary_inv_freq")  # the model computes them
    missing = [n for n, p in model.named_parameters() if not p.is_inited() and not any(w in n for w in initialised)]
    assert not missing, f"left uninitialised: {missing}"
    config = copy.deepcopy(config)
    config.plugin_config.dtype = model.config.dtype
    config.update_kv_cache_type(model.config.architecture)
    builder._init_max_seq_len(model.config, config)
    assert config.max_batch_size == (options.max_batch_size or 2048)
    assert config.output_timing_cache is None
    assert config.max_seq_len == (options.max_seq_len or model.config.max_position_embeddings), config.max_seq_len
    assert config.kv_cache_type == KVCacheType[(options.kv_cache_type or "paged").upper()]
    assert config.use_refit == options.refit and config.use_strip_plan == options.strip_plan


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
