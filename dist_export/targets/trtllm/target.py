"""The TensorRT-LLM target: from an opened checkpoint and options to an export plan."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field, to_builtins

from dist_export.errors import ExportError, Faults
from dist_export.models.catalog import SourceCatalog
from dist_export.models.config import ModelConfig
from dist_export.models.features import refuse_quantised
from dist_export.models.logical import LogicalModel
from dist_export.models.provenance import ResolvedConfig
from dist_export.models.quantization import Quantization
from dist_export.models.rules import Family
from dist_export.plan.export import ExportPlan
from dist_export.plan.layout import TargetLayout
from dist_export.plan.quantize import LinearQuantizer
from dist_export.plan.shard import ShardPlan, ShardPlanner
from dist_export.targets.trtllm import quantization as quantized
from dist_export.targets.trtllm.architecture import EngineModel, choose_engine
from dist_export.targets.trtllm.build_command import build_command
from dist_export.targets.trtllm.config import ServingOptions, build_config, engine_faults, model_notes
from dist_export.targets.trtllm.quantization_config import notes_of, quantization_config
from dist_export.targets.trtllm.releases import RELEASES, check_config, described, parse_release, split_layers
from dist_export.targets.trtllm.tables import EmbeddingSharding
from dist_export.tensors.dtypes import dtype_by_name

NAME = "trtllm"


class TrtllmOptions(Struct, frozen=True, kw_only=True):
    """What the user chooses of a TensorRT-LLM export."""

    tp_size: int = 1
    pp_size: int = 1
    moe_ep_size: int = 1
    """How many ways the tp ranks divide the experts; the rest of tp divides each expert."""
    dtype: str = "bfloat16"
    embedding: EmbeddingSharding = field(default_factory=EmbeddingSharding)
    release: str | None = None
    """As given to ``--trtllm-version``; None means every release that has the model class."""

    @classmethod
    def from_plain(cls, values: Mapping[str, object]) -> TrtllmOptions:
        """Options out of a manifest."""
        embedding = values.get("embedding")
        assert isinstance(embedding, Mapping)
        return cls(**{**values, "embedding": EmbeddingSharding(**embedding)})  # type: ignore[arg-type]


class RankFiles(Struct, frozen=True):
    """One file per target rank."""

    planner: ShardPlanner

    @property
    def num_files(self) -> int:
        return self.planner.layout.world_size

    def make(self, number: int, faults: Faults) -> ShardPlan:
        """The file of target rank `number`."""
        return self.planner.plan(number, file_name=f"rank{number}.safetensors", faults=faults)

    def documents(self) -> Mapping[str, object]:
        """Rank files need no index."""
        return {}


def plan_export(
    family: Family,
    resolved: ResolvedConfig,
    catalog: SourceCatalog,
    options: TrtllmOptions,
    *,
    quantization: Quantization | None = None,
    folder: str = ".",
) -> ExportPlan:
    """The export plan, from metadata alone. Raises `ExportError` for anything the target cannot express."""
    model = resolved.config
    wanted = parse_release(options.release) if options.release else None
    engine = choose_engine(_engines(family), wanted)
    layout = _layout(engine, model, options, wanted)
    engine_faults(engine, model, layout).raise_if_any()
    releases = engine.valid_releases(model, layout, options.dtype, wanted)
    config = build_config(engine, model, layout, ServingOptions(options.dtype, options.embedding))
    rules, quantizer = engine.rules(options.embedding), None
    notes: tuple[str, ...] = ()
    documents: dict[str, object] = {}
    if quantization is not None:
        refuse_quantised(model)
        written = quantization_config(quantization, rules, layout, releases)
        releases, config["quantization"], documents = written.releases, written.table, written.documents
        quantizer = LinearQuantizer(quantization, quantized.DIALECT)
        notes = notes_of(quantization, layout.tp_size, releases)
    check_config(config, engine.keys, releases)
    logical = LogicalModel(catalog, family.source_rules, model)
    planner = ShardPlanner(rules, logical, layout, dtype_by_name(options.dtype), quantizer)
    return ExportPlan(
        target=NAME,
        folder=folder,
        family=family,
        architecture=engine.name,
        resolved=resolved,
        planner=planner,
        quantization=quantization,
        files=RankFiles(planner),
        config=config,
        more_documents=documents,
        options=to_builtins(options),
        facts={
            "layout": f"{layout}, layers per stage {', '.join(map(str, layout.layers_per_stage))}",
            "valid in": f"TensorRT-LLM {described(releases)}",
        },
        serve=(
            build_command(config, checkpoint="{output}"),
            "trtllm-serve ENGINES --tokenizer TOKENIZER  # TensorRT-LLM 1.0 and later: and --backend tensorrt",
        ),
        notes=(*resolved.notes, *model_notes(model), *engine.notes(model), *notes),
    )


def _engines(family: Family) -> tuple[EngineModel, ...]:
    found = tuple(each for each in family.architectures.get(NAME, ()) if isinstance(each, EngineModel))
    if not found:
        why = f" that can be exported: {family.unserved[NAME]}" if NAME in family.unserved else ""
        raise ExportError(
            f"the family {family.name} has no engine model in TensorRT-LLM{why}; export it with --target hf"
        )
    return found


def _layout(engine: EngineModel, model: ModelConfig, options: TrtllmOptions, wanted: str | None) -> TargetLayout:
    """The layout, with layers divided as all the releases in question divide them."""
    candidates = (wanted,) if wanted else tuple(release for release in RELEASES if release in engine.releases)
    stages = split_layers(model.num_layers, options.pp_size, candidates)
    if options.moe_ep_size > 1 and not model.num_experts:
        raise ExportError(f"moe ep {options.moe_ep_size}: the model has no experts")
    return TargetLayout(options.tp_size, options.pp_size, stages, options.moe_ep_size)
