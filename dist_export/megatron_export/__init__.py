"""The Python surface of ``megatron.core.export.trtllm``, built on this program's rules and plans.

For people who move over: change the import, keep the calls.

    from dist_export.megatron_export import ExportConfig, TRTLLMHelper

    helper = TRTLLMHelper(
        transformer_config=model.config, model_type=ModelType.llama, position_embedding_type="rope", …
    )
    weights, configs = helper.get_trtllm_pretrained_config_and_model_weights(
        model_state_dict=model.state_dict(), dtype=DataType.bfloat16, export_config=ExportConfig(inference_tp_size=2)
    )
    for rank_weights, rank_config in zip(weights, configs):
        helper.build_and_save_engine(engine_dir, rank_weights, rank_config)

Names, order and defaults of arguments are Megatron-Core's (megatron/core/export/trtllm/trtllm_helper.py and
trtllm_weights_converter/distributed_trtllm_model_weights_converter.py). What is different:

- It works where that did not: pipeline stages and virtual ones, experts, fewer KV heads than tp ranks, any vocabulary
  size, any target layout also in the distributed form, saturating FP8 whose weight scales are measured on the weights.
- Nothing of tensorrt_llm is imported before an engine is built. The configurations are `RankConfig` values: what
  ``config.json`` holds, and the rank; ``to_pretrained_config()`` makes TensorRT-LLM's own object.
- The model's numbers come from ``transformer_config``; an argument that contradicts it is an error. ``model_type`` is
  checked, not believed. An FP8 KV cache needs scales: calibrated ones, or ``kv_cache_scale`` (never silently 1.0).
- ``model_state_dict`` may also be what ``model.sharded_state_dict()`` returns, or one state dict per virtual stage.
- Enumerations are compared by name: Megatron-Core's, or plain strings.

Weights that are on disk need none of this: ``dist-export export`` reads checkpoints without building a model.
"""

from dist_export.megatron_export.converter import DistributedTRTLLMModelWeightsConverter
from dist_export.megatron_export.helper import TRTLLMHelper
from dist_export.megatron_export.values import ExportConfig, RankConfig

__all__ = ["DistributedTRTLLMModelWeightsConverter", "ExportConfig", "RankConfig", "TRTLLMHelper"]
