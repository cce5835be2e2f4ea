"""Plans of very large models, dense and with experts, from names and shapes alone."""

from __future__ import annotations

from dist_export.families.llama import engine_rules
from dist_export.families.registry import choose_family
from dist_export.models.catalog import SourceCatalog
from dist_export.models.layout_ops import SPLIT_HALVES
from dist_export.models.logical import LogicalModel
from dist_export.models.megatron import ATTENTION, EMBEDDINGS, NORMS
from dist_export.models.provenance import ResolvedConfig
from dist_export.models.resolve import resolve_config
from dist_export.models.rules import Family, Input, SourceRule, TargetRule
from dist_export.models.shard_ops import COLUMN, ROW
from dist_export.plan.export import ExportPlan
from dist_export.plan.layout import TargetLayout
from dist_export.plan.shard import ShardPlanner
from dist_export.targets.trtllm.tables import EmbeddingSharding
from dist_export.targets.trtllm.target import RankFiles, TrtllmOptions, plan_export
from dist_export.tensors.dtypes import dtype_by_name
from support.large_models import LargeModel

SOURCE, LOGICAL = "decoder.layers.{layer}.mlp.", "layers.{layer}.mlp."
EXPERT = "experts.experts.{expert}."
EXPERT_SOURCES = (
    SourceRule(SOURCE + "router.weight", (LOGICAL + "router.weight",)),
    SourceRule(
        SOURCE + EXPERT + "linear_fc1.weight",
        (LOGICAL + "{expert}.gate.weight", LOGICAL + "{expert}.up.weight"),
        SPLIT_HALVES,
    ),
    SourceRule(SOURCE + EXPERT + "linear_fc2.weight", (LOGICAL + "{expert}.down.weight",)),
)
TARGET = "transformer.layers.{layer}.mlp."
EXPERT_TARGETS = (
    TargetRule(TARGET + "router.weight", (Input(LOGICAL + "router.weight"),), dtype="float32"),
    TargetRule(
        TARGET + "fc.weight",
        (Input(LOGICAL + "{expert}.up.weight", COLUMN), Input(LOGICAL + "{expert}.gate.weight", COLUMN)),
    ),
    TargetRule(TARGET + "proj.weight", (Input(LOGICAL + "{expert}.down.weight", ROW),)),
)
MIXTURE = Family(
    name="mixture",
    description="Llama with experts in every layer, for tests of scale",
    unmet=lambda config: [],
    source_rules=(*EMBEDDINGS, *NORMS, *ATTENTION, *EXPERT_SOURCES),
    architectures={},
)


def shapes_of(model: LargeModel) -> dict[str, tuple[tuple[int, ...], str]]:
    """Global name -> (shape, dtype name), as a checkpoint index gives them."""
    return {name: (tensor.shape, "bfloat16") for name, tensor in model.tensors().items()}


def resolve(model: LargeModel, catalog: SourceCatalog) -> ResolvedConfig:
    """The configuration of a model, as `inspect` finds it."""
    return resolve_config(
        arguments=model.arguments(), shapes=catalog.folded_shapes(), num_layers_found=catalog.num_layers, overrides={}
    )


def large_plan(
    model: LargeModel, *, tp: int, pp: int, moe_ep: int = 1, catalog: SourceCatalog | None = None
) -> ExportPlan:
    """The TensorRT-LLM plan of a model; stages are as equal as its layers allow."""
    catalog = catalog or SourceCatalog(shapes_of(model))
    resolved = resolve(model, catalog)
    if not model.num_experts:
        family = choose_family(resolved.config)
        return plan_export(family, resolved, catalog, TrtllmOptions(tp_size=tp, pp_size=pp, release="1.0"))
    stages = tuple(model.num_layers * (i + 1) // pp - model.num_layers * i // pp for i in range(pp))
    logical = LogicalModel(catalog, MIXTURE.source_rules, resolved.config)
    rules = [rule for rule in engine_rules(EmbeddingSharding()) if ".mlp." not in rule.target]
    planner = ShardPlanner(
        (*rules, *EXPERT_TARGETS), logical, TargetLayout(tp, pp, stages, moe_ep), dtype_by_name("bfloat16")
    )
    return ExportPlan(
        target="trtllm",
        family=MIXTURE,
        architecture="MixtralForCausalLM",
        resolved=resolved,
        planner=planner,
        files=RankFiles(planner),
        config={"architecture": "MixtralForCausalLM"},
        options={},
        facts={},
    )
