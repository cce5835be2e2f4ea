"""A live table as an opened model: its configuration, its catalogue, and how it is quantised."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import asdict, replace

from dist_export.api import OpenedModel, Source, open_model
from dist_export.checkpoint.extra_state import decode_extra_state
from dist_export.checkpoint.extra_state_records import state_records
from dist_export.checkpoint.open import Checkpoint
from dist_export.checkpoint.te_states import ExpertGroups, TeScales, te_scales_of
from dist_export.live.table import ORIGIN, LiveTable
from dist_export.quantization import QuantizationOptions, States


def open_live(
    table: LiveTable,
    arguments: Mapping[str, object],
    *,
    overrides: Mapping[str, tuple[object, str]] | None = None,
    quantization: QuantizationOptions | None = None,
    te: TeScales | None = None,
) -> OpenedModel:
    """The model of a live table, as `dist_export.api.open_model` gives that of a checkpoint. Pure; any rank.

    Args:
        arguments: As `configuration.arguments_of` gives them.
        overrides: Configuration field -> (value, who gave it).
        te: The scales of the layers' states (`te_scales`); none where they are not given.

    Raises `ExportError` for a configuration that is incomplete or contradicts the tensors.
    """
    options = quantization or QuantizationOptions()
    source = Source(checkpoint=ORIGIN, overrides=overrides or {}, quantization=options)
    model = open_model(source, Checkpoint(table.index, {"args": dict(arguments)}))
    return replace(model, _states=[States(None, te or TeScales())])


def te_scales(
    table: LiveTable, data: Mapping[str, bytes], options: QuantizationOptions, arguments: Mapping[str, object]
) -> TeScales:
    """TransformerEngine's scales, from the bytes of every object of the table. Raises `ExportError`."""
    records = [record for record in state_records(table.index) if record.name in data]
    states = [(record, decode_extra_state(data[record.name], origin=record.name)) for record in records]
    groups = ExpertGroups.of_arguments(arguments)
    return te_scales_of(states, **asdict(groups), te_version=options.te_release)
