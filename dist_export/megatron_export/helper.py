"""``TRTLLMHelper`` with the arguments of Megatron-Core's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_export.errors import ExportError
from dist_export.live.configuration import arguments_of
from dist_export.live.opening import Ranks, States
from dist_export.megatron_export.converter import LiveModel, plan_of, with_multi_query
from dist_export.megatron_export.values import ExportConfig, RankConfig, check_activation, check_model_type
from dist_export.plan.export import ExportPlan
from dist_export.quantization import QuantizationOptions

_EXPERT_PARALLEL = 1  # ``ParallelismMode.EXPERT_PARALLEL`` of tensorrt_llm/layers/moe.py (0.12); 2 is tensor parallel


class TRTLLMHelper:
    """Turns a Megatron-Core model in memory into TensorRT-LLM weights, configurations and engines.

    Keyword arguments and defaults as in Megatron-Core; `rope_scaling` is new: whether Llama-3.1 scaling by
    `rope_scaling_factor` holds (default: with model type nemotron_nas only, as there).
    """

    def __init__(
        self,
        *,
        transformer_config: Any,
        model_type: object,
        trtllm_conversion_dict: Mapping[str, object] | None = None,
        position_embedding_type: str = "learned_absolute",
        max_position_embeddings: int | None = None,
        rotary_percentage: float = 1.0,
        rotary_base: int = 10000,
        rope_scaling_factor: float = 8.0,
        moe_tp_mode: int = 2,
        multi_query_mode: bool = False,
        activation: str = "gelu",
        seq_len_interpolation_factor: float | None = None,
        moe_renorm_mode: object = None,
        share_embeddings_and_output_weights: bool = False,
        rope_scaling: bool | None = None,
    ) -> None:
        if position_embedding_type not in ("learned_absolute", "rope"):
            raise ExportError(f"position_embedding_type {position_embedding_type}: expected learned_absolute or rope")
        if moe_tp_mode not in (0, _EXPERT_PARALLEL, 2):
            raise ExportError(f"moe_tp_mode {moe_tp_mode}: expected 1 (expert parallel) or 2 (tensor parallel)")
        if moe_renorm_mode is not None:
            raise ExportError("moe_renorm_mode: leave it out; transformer_config says how the router normalises")
        check_activation(activation, transformer_config)
        self.transformer_config, self.model_type = transformer_config, model_type
        self.trtllm_conversion_dict = dict(trtllm_conversion_dict or {})
        self.moe_tp_mode = moe_tp_mode
        nas = str(getattr(model_type, "name", model_type)) == "nemotron_nas"
        self._arguments = arguments_of(
            with_multi_query(transformer_config, multi_query_mode),
            position_embedding_type=position_embedding_type,
            max_position_embeddings=max_position_embeddings,
            rotary_percent=rotary_percentage,
            rotary_base=rotary_base,
            seq_len_interpolation_factor=seq_len_interpolation_factor,
            share_embeddings_and_output_weights=share_embeddings_and_output_weights,
            rope_scaling=nas if rope_scaling is None else rope_scaling,
            rope_scaling_factor=rope_scaling_factor,
        )

    def get_trtllm_pretrained_config_and_model_weights(
        self,
        model_state_dict: States,
        dtype: object,
        export_config: Any = None,
        on_device_distributed_conversion: bool = False,
        vocab_size: int | None = None,
        gpus_per_node: int | None = None,
        state_dict_split_by_layer_numbers: bool = True,
        fp8_quantized: bool = False,
        fp8_kvcache: bool = False,
        kv_cache_scale: float | None = None,
    ) -> tuple[list[dict[str, Any]], list[RankConfig]]:
        """Two lists of equal length: tensors by name (on the CPU), and configurations.

        In one process (the default) `model_state_dict` is the whole model, and there is an entry per target rank of
        `export_config`. With `on_device_distributed_conversion` every rank calls it with its own state; without
        `export_config` it gets the one entry of its own tp and pp rank, with one the target ranks r, r + number of
        processes, …. `vocab_size` is the tokenizer's; without it padding is kept. `state_dict_split_by_layer_numbers`
        is accepted and seen from the names instead. `fp8_quantized` takes TransformerEngine's scales of activations out
        of the state dict and measures weights; `fp8_kvcache` needs calibrated scales there, or `kv_cache_scale`.

        Raises `ExportError` for anything that cannot be converted exactly.
        """
        if on_device_distributed_conversion and vocab_size is None:
            raise ExportError("vocab_size, the tokenizer's, is needed with on_device_distributed_conversion")
        if not on_device_distributed_conversion and export_config is None:
            export_config = ExportConfig()
        ranks = Ranks.of_megatron() if on_device_distributed_conversion else None
        model = LiveModel.of(
            model_state_dict,
            self._arguments,
            ranks=ranks,
            conversion=self.trtllm_conversion_dict,
            vocab_size=vocab_size,
            quantization=QuantizationOptions(
                algorithm="fp8" if fp8_quantized else "auto",
                kv_cache="fp8" if fp8_kvcache else "auto",
                kv_cache_scale=kv_cache_scale,
            ),
        )
        target, own = _target(export_config, ranks, model)
        tp_size = target.inference_tp_size
        export_plan = plan_of(
            model.opened, target, dtype, moe_ep_size=tp_size if self.moe_tp_mode == _EXPERT_PARALLEL else 1
        )
        check_model_type(self.model_type, export_plan.family.name)
        weights = model.convert(export_plan, model.peers.gather(own))
        return [weights[rank] for rank in own], [_config(export_plan, rank, gpus_per_node) for rank in own]

    def build_and_save_engine(
        self,
        engine_dir: str,
        trtllm_model_weights: dict[str, Any],
        trtllm_model_config: Any,
        max_input_len: int = 1024,
        max_output_len: int = 1024,
        max_batch_size: int = 4,
        lora_ckpt_list: list[str] | None = None,
        use_lora_plugin: str | None = None,
        max_lora_rank: int = 64,
        lora_target_modules: list[str] | None = None,
        max_prompt_embedding_table_size: int = 0,
        paged_kv_cache: bool = True,
        remove_input_padding: bool = True,
        paged_context_fmha: bool = False,
        use_refit: bool = False,
        max_num_tokens: int | None = None,
        max_seq_len: int | None = None,
        opt_num_tokens: int | None = None,
        max_beam_width: int = 1,
        tokens_per_block: int = 128,
        multiple_profiles: bool = False,
        gpt_attention_plugin: str = "auto",
        gemm_plugin: str = "auto",
    ) -> Any:
        """Build one rank's engine on the current CUDA device, save it in `engine_dir`, and return it.

        `trtllm_model_config` is a `RankConfig` (or TensorRT-LLM's own object). Every rank may build at the same time
        into one folder; the rank whose mapping says 0 writes ``config.json``. Imports tensorrt_llm. Raises
        `ExportError` where it is not installed, or the options do not fit the model.
        """
        from dist_export.engines.adapter import build_from_weights
        from dist_export.engines.options import EngineOptions

        options = EngineOptions(
            max_input_len=max_input_len,
            max_seq_len=max_seq_len or max_input_len + max_output_len,
            max_batch_size=max_batch_size,
            max_beam_width=max_beam_width,
            max_num_tokens=max_num_tokens or max_batch_size * max_input_len,
            opt_num_tokens=opt_num_tokens,
            max_prompt_embedding_table_size=max_prompt_embedding_table_size,
            kv_cache_type="paged" if paged_kv_cache else "continuous",
            tokens_per_block=tokens_per_block if paged_kv_cache else None,
            remove_input_padding=remove_input_padding,
            use_paged_context_fmha=paged_context_fmha,
            multiple_profiles=multiple_profiles,
            gpt_attention_plugin=gpt_attention_plugin,
            gemm_plugin=gemm_plugin,
            refit=use_refit,
            lora_plugin=use_lora_plugin,
            lora_dir=tuple(lora_ckpt_list or ()),
            lora_ckpt_source="nemo",
            max_lora_rank=max_lora_rank,
            lora_target_modules=tuple(lora_target_modules or ()),
        )
        return build_from_weights(trtllm_model_weights, trtllm_model_config, options, engine_dir)


def _target(export_config: Any, ranks: Ranks | None, model: LiveModel) -> tuple[Any, list[int]]:
    """The target layout, and the target ranks that this process makes."""
    if export_config is None:
        assert ranks is not None
        layout = ExportConfig(ranks.tp_size, ranks.pp_size, use_parallel_embedding=True)
        return layout, [ranks.pp * ranks.tp_size + ranks.tp]
    world_size = export_config.inference_tp_size * export_config.inference_pp_size
    return export_config, list(range(model.peers.rank, world_size, model.peers.world_size))


def _config(export_plan: ExportPlan, rank: int, gpus_per_node: int | None) -> RankConfig:
    values: dict[str, Any] = dict(export_plan.config)
    mapping = dict(values["mapping"])
    mapping["gpus_per_node"] = gpus_per_node or mapping["tp_size"]
    return RankConfig({**values, "mapping": mapping}, rank)
