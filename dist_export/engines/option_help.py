"""What ``dist-export engine --help`` says of every option of an engine build."""

from __future__ import annotations

from collections.abc import Mapping

from dist_export.engines.options import CHOICES, SINCE, option_flags

_HELP: Mapping[str, str] = {
    "max_batch_size": "requests at a time (2048; 0.12 and 0.13: 256)",
    "max_input_len": "tokens of a prompt (1024)",
    "max_seq_len": "tokens of a prompt and its answer (the model's positions)",
    "max_num_tokens": "tokens of a batch without padding (8192)",
    "opt_num_tokens": "tokens of a batch that kernels are chosen for",
    "max_beam_width": "beams of a beam search (1)",
    "max_prompt_embedding_table_size": "rows of prompt tuning or of multimodal inputs (0)",
    "kv_cache_type": "disabled: since 0.13",
    "strongly_typed": "disable: TensorRT may choose other types (enable)",
    "logits_dtype": "instead of the export's",
    "gather_context_logits": "logits of the prompt too",
    "gather_generation_logits": "logits of every generated token",
    "refit": "weights of the engine can be replaced; no flag of trtllm-build",
    "strip_plan": "leave the weights out of the engine; refit puts them in",
    "weight_sparsity": "use 2:4 sparse weights",
    "weight_streaming": "stream weights from host memory",
    "fast_build": "build faster, for a slower engine",
    "profiling_verbosity": "what the engine tells of its layers (layer_names_only)",
    "enable_debug_output": "mark debug outputs",
    "input_timing_cache": "file of kernel timings to start from",
    "output_timing_cache": "file to write them to (none)",
    "dry_run": "load every rank and make its network; build nothing",
    "workers": "builds at a time on this machine (one per GPU)",
    "log_level": "TensorRT-LLM's (info; trace: since 1.1)",
    "speculative_decoding_mode": "the engine verifies drafts",
    "max_draft_len": "tokens of a draft (0)",
    "lora_dir": "folders of adapters, with commas between",
    "lora_ckpt_source": "whose format they have (hf)",
    "lora_target_modules": "modules with adapters, with commas between",
    "max_lora_rank": "highest rank of an adapter (64)",
    "gpt_attention_plugin": "",
    "gemm_plugin": "nvfp4: since 0.18",
    "gemm_swiglu_plugin": "",
    "low_latency_gemm_plugin": "",
    "moe_plugin": "",
    "nccl_plugin": "",
    "lora_plugin": "needed for adapters",
    "context_fmha": "fused attention of the prompt",
    "remove_input_padding": "pack the tokens of a batch",
    "use_paged_context_fmha": "reuse of the KV cache and chunked prompts",
    "use_fp8_context_fmha": "FP8 attention, of FP8 models",
    "tokens_per_block": "of a paged KV cache",
    "multiple_profiles": "several optimisation profiles",
    "reduce_fusion": "all-reduce with residual and norm; Llama with tp above 1",
    "use_fused_mlp": "gate and up as one matrix",
    "user_buffer": "fewer copies around the all-reduce; with reduce_fusion",
    "streamingllm": "attention over a window and sinks; Llama",
    "pp_reduce_scatter": "reduce-scatter between pipeline stages; Mixtral",
}

EPILOG = """\
Names and defaults are those of trtllm-build; switches take enable and disable, and alone enable.
--engine-config FILE has the same names, and options on the command line replace the file's:
  max_batch_size: 64
  gemm_plugin: auto
  use_paged_context_fmha: true

All ranks of the export are built at the same time, each on a GPU of its own. Alone, the command
uses every GPU that CUDA_VISIBLE_DEVICES shows; several processes build a share each, on their GPUs:
  torchrun --nproc-per-node 8 -m dist_export engine OUTPUT ENGINES
  srun --ntasks 8 dist-export engine OUTPUT ENGINES
  mpirun -np 8 dist-export engine OUTPUT ENGINES
ENGINES appears whole, with rank{R}.engine and config.json, or not at all; a rank that fails
ends all of them, non-zero. Without TensorRT-LLM 0.12 to 1.2 or a GPU the command stops at once.
"""


def help_of(name: str) -> str:
    """One line: values, meaning, default in parentheses, releases."""
    values = f"{{{','.join(CHOICES[name])}}}" if name in CHOICES else ""
    releases = f"[{SINCE[name]}]" if name in SINCE else ""
    return " ".join(filter(None, (values, _HELP[name], releases)))


def metavar_of(name: str) -> str:
    """What stands for the option's value."""
    if option_flags()[name]:
        return "on"
    return "VALUE" if name in CHOICES or name.startswith(("lora", "input", "output")) else "N"
