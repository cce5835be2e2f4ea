"""quantization_report.json: per quantised tensor its scale, how many weights saturate, and the noise of its codes."""

from __future__ import annotations

from collections.abc import Mapping

from dist_export.checkpoint.quantizer_scheme import KvScheme
from dist_export.convert.quality import FEW_ROWS, SAMPLED, Quality
from dist_export.convert.remeasure import is_measured
from dist_export.convert.scale_table import ScaleTable
from dist_export.models.quantization import Quantization
from dist_export.plan.export import ExportPlan
from dist_export.plan.recipes import Encoded, Scalars

REPORT = "quantization_report.json"
NUM_WORST = 10


def quantization_report(
    plan: ExportPlan, numbers: range, qualities: Mapping[str, Quality], table: ScaleTable
) -> dict[str, object] | None:
    """The report of a plan; None where nothing is quantised. `numbers` are the job's numbers of its files, `qualities`
    those of all processes by ``file/tensor``."""
    if plan.quantization is None:
        return None
    tensors: dict[str, dict[str, object]] = {}
    activations: dict[str, object] = {}
    ranked: list[tuple[float, str]] = []
    one_file = plan.num_files == 1 or plan.planner.layout.world_size == 1  # names are of their own in all files
    for number, shard in zip(numbers, plan.each_shard(), strict=True):
        for index, tensor in enumerate(shard.tensors):
            name, recipe = tensor.name if one_file else f"{shard.file_name}: {tensor.name}", tensor.recipe
            if isinstance(recipe, Scalars) and recipe.of_inputs:
                activations[name] = [float(table.input_scale(group, recipe.divisor)) for group in recipe.groups]
            if not isinstance(recipe, Encoded) or not is_measured(recipe.codes):
                continue
            quality = qualities.get(f"{number}/{index}", Quality())
            tensors[name] = {"codes": recipe.codes.value[0], **quality.describe()}
            if quality.snr_db is not None:
                ranked.append((quality.snr_db, name))
    return {
        **describe(plan.quantization),
        "measured": f"tensors of up to {FEW_ROWS} rows whole, of larger ones 2 rows in {SAMPLED}",
        "worst": [{"tensor": name, "snr_db": snr} for snr, name in sorted(ranked)[:NUM_WORST]],
        "tensors": tensors,
        "activation_scales": activations,
    }


def describe(quantization: Quantization) -> dict[str, object]:
    """Scheme and origin."""
    kinds: dict[str, int] = {}
    for each in quantization.schemes.values():
        kinds[each.scheme.value] = kinds.get(each.scheme.value, 0) + 1
    kv_cache = quantization.kv_cache
    return {
        "scheme": quantization.overall.value,
        "origin": quantization.origin,
        "linears": kinds,
        "kv_cache": None if kv_cache is KvScheme.NONE else kv_cache.value,
    }
