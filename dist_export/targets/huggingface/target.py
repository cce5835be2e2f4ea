"""The Hugging Face target: from an opened checkpoint and options to an export plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct, field, to_builtins

from dist_export.errors import ExportError, Faults
from dist_export.models.catalog import SourceCatalog
from dist_export.models.features import refuse_quantised
from dist_export.models.logical import LogicalModel
from dist_export.models.provenance import ResolvedConfig
from dist_export.models.quantization import Quantization
from dist_export.models.rules import Family
from dist_export.plan.export import ExportPlan
from dist_export.plan.layout import TargetLayout
from dist_export.plan.shard import ShardPlan, ShardPlanner
from dist_export.targets.huggingface import quantization as quantized
from dist_export.targets.huggingface.architecture import HuggingFaceModel
from dist_export.targets.huggingface.config import build_config, generation_config, model_faults
from dist_export.targets.huggingface.files import DEFAULT_FILE_BYTES, INDEX, build_index, name_files, split_files
from dist_export.targets.huggingface.reference import GENERATION, Reference, read_json, tokenizer_files
from dist_export.tensors.dtypes import dtype_by_name

NAME = "hf"


class HuggingFaceOptions(Struct, frozen=True, kw_only=True):
    """What the user chooses of a Hugging Face export."""

    dtype: str = "bfloat16"
    file_bytes: int = DEFAULT_FILE_BYTES
    """Largest size of one file's tensors."""
    reference: str | None = None
    """A Hugging Face folder of the same model: configuration, tokenizer, vocabulary size."""
    tokenizer: str | None = None
    """A folder with tokenizer files, before those of the reference."""
    quantization_format: str = quantized.AUTO
    """Layout of quantised linears: ``modelopt``, ``compressed-tensors``, or ``auto``."""

    @classmethod
    def from_plain(cls, values: Mapping[str, object]) -> HuggingFaceOptions:
        """Options out of a manifest."""
        return cls(**values)  # type: ignore[arg-type]


class SizedFiles(Struct, frozen=True):
    """All tensors, in as few files as their size allows. Planned as a whole on first use."""

    planner: ShardPlanner
    most_bytes: int
    _made: dict[int, ShardPlan] = field(default_factory=dict)

    @property
    def num_files(self) -> int:
        return len(self._shards(Faults("the export cannot be planned")))

    def make(self, number: int, faults: Faults) -> ShardPlan:
        """File `number`; the faults of all of them are added."""
        return self._shards(faults)[number]

    def documents(self) -> Mapping[str, object]:
        """The index, which loaders look for only when there are several files."""
        shards = self._shards(Faults("the export cannot be planned"))
        return {INDEX: build_index(shards)} if len(shards) > 1 else {}

    def _shards(self, faults: Faults) -> dict[int, ShardPlan]:
        if not self._made:
            tensors = self.planner.tensors(0, faults=faults)
            faults.raise_if_any()
            self._made.update(name_files(split_files(tensors, self.most_bytes)))
        return self._made


def plan_export(
    family: Family,
    resolved: ResolvedConfig,
    catalog: SourceCatalog,
    options: HuggingFaceOptions,
    *,
    quantization: Quantization | None = None,
    folder: str = ".",
) -> ExportPlan:
    """The export plan, from metadata alone. Raises `ExportError` for anything the target cannot express."""
    model = resolved.config
    architecture = _architecture(family)
    model_faults(architecture, model).raise_if_any()
    logical = LogicalModel(catalog, family.source_rules, model)
    layout = TargetLayout(1, 1, (model.num_layers,))
    quantizer, form, notes = None, "", (*resolved.notes, *architecture.notes(model))
    if quantization is not None:
        refuse_quantised(model)
        form = quantized.chosen_format(quantization, options.quantization_format)
        quantizer = quantized.quantizer_of(quantization, form)
        notes = (*notes, *quantization.notes, *quantized.notes_of(quantization, form))
    planner = ShardPlanner(architecture.rules, logical, layout, dtype_by_name(options.dtype), quantizer)
    config = build_config(architecture, model, options.dtype)
    documents: dict[str, object] = {GENERATION: generation_config()}
    if quantization is not None:
        config["quantization_config"] = quantized.config_of(quantization, form, architecture.rules)
        if form == quantized.MODELOPT:
            ignored = quantized.unquantized(quantization, form, architecture.rules)
            layers = quantized.mixed_layers(quantization, architecture.rules)
            documents[quantized.QUANT_CONFIG] = quantized.quant_config(quantization, ignored, layers)
    copies: dict[str, Path] = {}
    if options.reference is not None:
        reference = Reference.read(Path(options.reference))
        config = reference.merged_config(config)
        if (reference.folder / GENERATION).is_file():
            documents[GENERATION] = read_json(reference.folder / GENERATION)
        if options.tokenizer is None:
            copies = tokenizer_files(reference.folder)
    if options.tokenizer is not None:
        copies = tokenizer_files(Path(options.tokenizer))
    return ExportPlan(
        target=NAME,
        folder=folder,
        family=family,
        architecture=architecture.name,
        resolved=resolved,
        planner=planner,
        quantization=quantization,
        files=SizedFiles(planner, options.file_bytes),
        config=config,
        more_documents=documents,
        copies=copies,
        options=to_builtins(options),
        facts={"layout": "Hugging Face folder"},
        serve=quantized.served_by(quantization, form),
        notes=notes,
    )


def _architecture(family: Family) -> HuggingFaceModel:
    for architecture in family.architectures.get(NAME, ()):
        if isinstance(architecture, HuggingFaceModel):
            return architecture
    raise ExportError(f"the family {family.name} has no Hugging Face architecture; export it with --target trtllm")
