"""Converting the state of live models: one process with the whole model, or every rank with its part."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from dist_export.api import OpenedModel, plan
from dist_export.checkpoint.quantizer_names import ModuleName
from dist_export.checkpoint.te_states import Activation, TeScale
from dist_export.live.configuration import arguments_of
from dist_export.live.memory import RankMemory
from dist_export.live.model import open_live, te_scales
from dist_export.live.opening import Ranks, States, gathered_objects, is_sharded, table_of
from dist_export.live.run import LiveExport, Peers
from dist_export.live.table import LiveTable
from dist_export.megatron_export.names import renamed
from dist_export.megatron_export.values import check_activation, dtype_name
from dist_export.plan.export import ExportPlan
from dist_export.quantization import QuantizationOptions
from dist_export.targets.trtllm.tables import EmbeddingSharding
from dist_export.targets.trtllm.target import TrtllmOptions

_POSITIONS = "embedding.position_embeddings.weight"


class LiveModel(Struct, frozen=True):
    """A model in the memory of one process or of many."""

    opened: OpenedModel
    table: LiveTable
    memory: RankMemory
    peers: Peers

    @classmethod
    def of(
        cls,
        states: States,
        arguments: Mapping[str, object],
        *,
        ranks: Ranks | None,
        conversion: Mapping[str, object],
        vocab_size: int | None,
        quantization: QuantizationOptions,
        scales: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> LiveModel:
        """Open it. Collective where `ranks` are given: every rank calls it with its own state."""
        peers = Peers.of_group() if ranks is not None else Peers()
        arguments = {**arguments, **(ranks or Ranks()).arguments()}
        arguments["untie_embeddings_and_output_weights"] = not arguments["share_embeddings_and_output_weights"]
        chunks = [states] if isinstance(states, Mapping) else list(states)
        if not is_sharded(chunks):
            chunks = [renamed(chunk, conversion) for chunk in chunks]
        table, memory, first_layer = table_of(chunks, arguments, ranks or Ranks(), peers)
        found = te_scales(table, gathered_objects(table, memory, peers), quantization, arguments)
        for each in peers.gather(list(_given_scales(scales or {}, first_layer))):
            found.scales.update({(scale.module, scale.activation): scale for scale in each})
        overrides = {} if vocab_size is None else {"vocab_size": (vocab_size, "tokenizer_vocab_size")}
        opened = open_live(table, arguments, overrides=overrides, quantization=quantization, te=found)
        return cls(opened, table, memory, peers)

    def convert(self, export_plan: ExportPlan, files: Sequence[Sequence[int]]) -> dict[int, dict[str, Any]]:
        """Target rank -> its tensors, for this process's target ranks `files[rank]`. Collective."""
        return LiveExport(export_plan, self.table, self.memory, self.peers).tensors(files)


def plan_of(opened: OpenedModel, export_config: Any, dtype: object, *, moe_ep_size: int = 1) -> ExportPlan:
    """The plan of a TensorRT-LLM export with the layout of an `ExportConfig` (or Megatron-Core's)."""
    options = TrtllmOptions(
        tp_size=export_config.inference_tp_size,
        pp_size=export_config.inference_pp_size,
        moe_ep_size=moe_ep_size,
        dtype=dtype_name(dtype),
        embedding=EmbeddingSharding(bool(export_config.use_parallel_embedding), 0),
    )
    return plan(opened, options)


_LINEARS = {
    "attention.qkv": "self_attention.linear_qkv",
    "attention.dense": "self_attention.linear_proj",
    "mlp.fc": "mlp.linear_fc1",
    "mlp.proj": "mlp.linear_fc2",
}
_SCALE_KEY = re.compile(r"transformer\.layers\.(\d+)\.(.+)\.activation_scaling_factor")


def _given_scales(scales: Mapping[str, Mapping[str, Any]], first_layer: int) -> Iterator[TeScale]:
    """Activation scales of a `scales` argument: TensorRT-LLM's keys, layers numbered within the rank.

    ``weight_multiplier`` is what training multiplied by before the cast. Scales of weights are not taken: those of
    TransformerEngine are a step old, and weights are measured.
    """
    for key, value in scales.items():
        match = _SCALE_KEY.fullmatch(key)
        if match is None or match[2] not in _LINEARS:
            continue
        module = ModuleName(f"decoder.layers.{{layer}}.{_LINEARS[match[2]]}", int(match[1]) + first_layer)
        yield TeScale(module, Activation.INPUT, float(value["weight_multiplier"]), f"scales[{key!r}]")


class DistributedTRTLLMModelWeightsConverter:
    """Converts a model that is spread over ranks; each rank gets the TensorRT-LLM tensors of its tp and pp rank.

    Arguments and attributes as in Megatron-Core. `scales` are those of its ``_load_scaling_factors``: with any, linears
    are quantised to FP8, saturating, with weight scales measured on the weights of all ranks.
    """

    def __init__(
        self,
        transformer_config: Any,
        dtype: object,
        multi_query_mode: bool = False,
        activation: str = "gelu",
        scales: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        check_activation(activation, transformer_config)
        self.transformer_config, self.dtype, self.activation = transformer_config, dtype, activation
        self.multi_query_mode, self.scales = multi_query_mode, dict(scales or {})
        self.trtllm_model_weights: dict[str, Any] = {}
        self._ranks = Ranks.of_megatron()
        self.inference_tp_size, self.inference_pp_size = self._ranks.tp_size, self._ranks.pp_size
        self.tp_rank, self.pp_rank = self._ranks.tp, self._ranks.pp

    def convert(
        self, model_state_dict: States, trtllm_conversion_dict: Mapping[str, object], tokenizer_vocab_size: int
    ) -> None:
        """Set `trtllm_model_weights`: name -> tensor on the CPU. Collective over all processes.

        Args:
            model_state_dict: This rank's ``state_dict()`` (a list with one per virtual stage) or
                ``sharded_state_dict()``.
            trtllm_conversion_dict: The model's own tensor names -> ``TRTLLMLayers``; {} for Megatron-Core's names.
            tokenizer_vocab_size: The true size of the vocabulary, of which padding is taken away.

        Raises `ExportError` for anything that cannot be converted exactly.
        """
        from dist_export.megatron_export.values import ExportConfig

        algorithm = "fp8" if self.scales else "auto"
        model = LiveModel.of(
            model_state_dict,
            self._arguments(model_state_dict, trtllm_conversion_dict),
            ranks=self._ranks,
            conversion=trtllm_conversion_dict,
            vocab_size=tokenizer_vocab_size,
            quantization=QuantizationOptions(algorithm=algorithm),
            scales=self.scales,
        )
        target = ExportConfig(self.inference_tp_size, self.inference_pp_size, use_parallel_embedding=True)
        export_plan = plan_of(model.opened, target, self.dtype)
        own = self.pp_rank * self.inference_tp_size + self.tp_rank
        files = model.peers.gather([own])
        self.trtllm_model_weights = model.convert(export_plan, files)[own]

    def _arguments(self, states: States, conversion: Mapping[str, object]) -> dict[str, object]:
        """What the weights depend on; what only the configuration does, which is not asked for here, has any value."""
        chunks = [states] if isinstance(states, Mapping) else states
        own = {name for chunk in chunks for name in renamed(chunk, conversion) if not name.startswith("decoder.")}
        names = set().union(*Peers.of_group().gather(own))
        learned = any(name.endswith(_POSITIONS) for name in names)
        tied = not any(name.endswith("output_layer.weight") for name in names)
        config = with_multi_query(self.transformer_config, self.multi_query_mode)
        return arguments_of(
            config,
            position_embedding_type="learned_absolute" if learned else "rope",
            max_position_embeddings=None if learned else 1,
            share_embeddings_and_output_weights=tied,
        )


def with_multi_query(transformer_config: Any, multi_query_mode: bool) -> Any:
    """The configuration with one key/value head, where that is how it is said."""
    if multi_query_mode and not getattr(transformer_config, "num_query_groups", None):
        return replace(transformer_config, num_query_groups=1)
    return transformer_config
