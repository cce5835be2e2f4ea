"""What saved arguments say about layers that differ: `blocks`, and the sizes of the first ones."""

from __future__ import annotations

from dist_export.errors import ExportError
from dist_export.models.blocks import Block, Blocks, blocks_from_json
from dist_export.models.megatron_arguments import Arguments
from dist_export.models.provenance import Claim, from_arguments, from_default
from dist_export.models.refusals import ENCODED_BLOCKS


def block_list_claim(arguments: Arguments, *, heads: int | None, hidden: int | None) -> Claim:
    """`blocks` from the JSON that Megatron keeps in its arguments (0.11). A block that names no size has that of
    `num_query_groups` or `ffn_hidden_size` (heterogeneous_config.py, `get_config_for_layer`)."""
    text = arguments.word(ENCODED_BLOCKS)
    if not text:
        known = arguments.has(ENCODED_BLOCKS)
        source = from_arguments(ENCODED_BLOCKS) if known else from_default(ENCODED_BLOCKS)
        return Claim(None, source, default=not known)
    groups, size = arguments.integer("num_query_groups"), arguments.integer("ffn_hidden_size")
    default = Block("full", groups or heads or 1, "full", size or 4 * (hidden or 1))
    try:
        blocks = blocks_from_json(text, num_attention_heads=heads or 1, hidden_size=hidden or 1, default=default)
    except ExportError as error:
        arguments.faults.add(f"checkpoint args: {ENCODED_BLOCKS}: {error}")
        return Claim(None, from_arguments(ENCODED_BLOCKS))
    return Claim(blocks, from_arguments(ENCODED_BLOCKS))


def first_sizes(claim: Claim) -> dict[str, Claim]:
    """The two sizes that differ between blocks, of the first that has each."""
    blocks = claim.value
    if not isinstance(blocks, Blocks):
        return {}
    sizes = {"num_query_groups": blocks.first_groups(), "ffn_hidden_size": blocks.first_ffn_size()}
    return {field: Claim(size, claim.source) for field, size in sizes.items() if size}
