"""The Tiny runtime: one safetensors file, names as its loader has them."""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from dist_export.errors import ExportError, Faults
from dist_export.models.catalog import SourceCatalog
from dist_export.models.logical import LogicalModel
from dist_export.models.provenance import ResolvedConfig
from dist_export.models.quantization import Quantization
from dist_export.models.rules import Family, Input, Scope, TargetRule
from dist_export.plan.export import ExportPlan
from dist_export.plan.layout import TargetLayout
from dist_export.plan.shard import ShardPlan, ShardPlanner
from dist_export.tensors.dtypes import dtype_by_name

NAME = "tiny"


class TinyModel(Struct, frozen=True):
    """What the runtime calls a kind of model, and its tensors."""

    name: str
    rules: tuple[TargetRule, ...]


class TinyOptions(Struct, frozen=True, kw_only=True):
    """What the user chooses; kept in the manifest, from which `verify` makes it again."""

    dtype: str = "bfloat16"

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "TinyOptions":
        """Options out of a manifest."""
        return cls(**values)


class OneFile(Struct, frozen=True):
    """How tensors are divided among files: here, they are not."""

    planner: ShardPlanner
    num_files: int = 1

    def make(self, number: int, faults: Faults) -> ShardPlan:
        """The plan of file `number`; what is wrong with it goes into `faults`."""
        return self.planner.plan(number, file_name="weights.safetensors", faults=faults)

    def documents(self) -> Mapping[str, object]:
        """JSON files that describe the tensor files: an index, where there are several."""
        return {}


def plan_export(
    family: Family,
    resolved: ResolvedConfig,
    catalog: SourceCatalog,
    options: TinyOptions,
    *,
    quantization: Quantization | None = None,
    folder: str = ".",
) -> ExportPlan:
    """The export plan, from metadata alone. Raises `ExportError` for what the runtime cannot express."""
    model = resolved.config
    found = [each for each in family.architectures.get(NAME, ()) if isinstance(each, TinyModel)]
    if not found or quantization is not None:
        raise ExportError(f"Tiny serves no {family.name} models, or not quantised")
    layout = TargetLayout(1, 1, (model.num_layers,))  # tp 1, pp 1, and the layers of each stage
    logical = LogicalModel(catalog, family.source_rules, model)
    planner = ShardPlanner(found[0].rules, logical, layout, dtype_by_name(options.dtype))
    return ExportPlan(
        target=NAME,
        folder=folder,
        family=family,
        architecture=found[0].name,
        resolved=resolved,
        planner=planner,
        files=OneFile(planner),
        config={"kind": found[0].name, "width": model.hidden_size, "layers": model.num_layers},
        options=asdict(options),
        facts={"layout": "one file"},
        serve=("tiny-serve {output}",),
        notes=resolved.notes,
    )


# What follows goes into families/llama.py, and "tiny": (TinyModel("llama", TINY),) into the family's architectures.
T, L = "blk.{layer}.", "layers.{layer}."
TINY = (
    TargetRule("token_embd", (Input("embedding.weight"),), Scope.FIRST),
    TargetRule(T + "attn_norm", (Input(L + "attention.norm.weight"),)),
    TargetRule(T + "attn_qkv", tuple(Input(f"{L}attention.{part}.weight") for part in ("query", "key", "value"))),
    TargetRule(T + "attn_out", (Input(L + "attention.output.weight"),)),
    TargetRule(T + "ffn_norm", (Input(L + "mlp.norm.weight"),)),
    TargetRule(T + "ffn_gate_up", (Input(L + "mlp.gate.weight"), Input(L + "mlp.up.weight"))),
    TargetRule(T + "ffn_down", (Input(L + "mlp.down.weight"),)),
    TargetRule("out_norm", (Input("final_norm.weight"),), Scope.LAST),
    TargetRule("out", (Input("head.weight"),), Scope.LAST, when=lambda config: not config.tied_embeddings),
)
