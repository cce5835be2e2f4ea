"""The true vocabulary size, where the checkpoint proves it.

Megatron pads the embedding to a multiple of make_vocab_size_divisible_by x tp and saves the padded size; the
size before padding is the tokenizer's. The `vocab_size` argument is what the user typed: most tokenizers never
look at it (megatron/training/tokenizer, megatron/core/tokenizers/utils/build_tokenizer.py), so it proves
something only for the tokenizers that take their size from it.
"""

from __future__ import annotations

from dist_export.models.megatron_arguments import Arguments
from dist_export.models.provenance import Claim, from_arguments

_NULL_TOKENIZERS = ("NullTokenizer", "NullMultimodalTokenizer")
_GIVE_IT = "give the tokenizer's size with --vocab-size or --set vocab_size=N to trim the padding"


def vocabulary_claim(arguments: Arguments | None, padded: Claim) -> tuple[Claim, list[str]]:
    """The claim for `vocab_size`, and notes. `padded` is the number of rows of the embedding."""
    assert isinstance(padded.value, int)
    if arguments is None:
        return _unproven(padded, "the checkpoint holds no training arguments")
    given = arguments.integer("vocab_size")
    tokenizer = arguments.word("tokenizer_type")
    if given is not None and arguments.has("should_pad_vocab"):
        return _provider(arguments, given, padded)
    if given is None:
        named = f" ({tokenizer})" if tokenizer else ""
        return _unproven(padded, f"the size is that of the tokenizer{named}, which the checkpoint does not say")
    if tokenizer in _NULL_TOKENIZERS:
        return _null_tokenizer(arguments, given, padded)
    if tokenizer == "TikTokenizer":  # cuts its vocabulary to the argument
        return _checked(arguments, given, padded, from_arguments("vocab_size", "tokenizer_type"))
    return _unproven(
        padded, f"vocab_size = {given} in the checkpoint args is not used by {tokenizer or 'the tokenizer'}"
    )


def _provider(arguments: Arguments, given: int, padded: Claim) -> tuple[Claim, list[str]]:
    """A Megatron-Bridge provider builds the model with `vocab_size`, padded only if `should_pad_vocab` says so
    (models/gpt_provider.py, `GPTModelProvider.provide`)."""
    if not arguments.switch("should_pad_vocab") and given == padded.value:
        return Claim(given, from_arguments("vocab_size", "should_pad_vocab")), []
    return _checked(arguments, given, padded, from_arguments("vocab_size", "should_pad_vocab"))


def _null_tokenizer(arguments: Arguments, given: int, padded: Claim) -> tuple[Claim, list[str]]:
    """A NullTokenizer adds its end-of-document token to the argument until 0.17.

    From 0.18 (which saves `null_tokenizer_eod_id`) the argument already counts it. One row too many is
    padding, one too few would lose a token, so the larger reading is taken where it fits.
    """
    source = from_arguments("vocab_size") + " + 1 (NullTokenizer)"
    counted = arguments.word("tokenizer_type") == "NullTokenizer" and arguments.has("null_tokenizer_eod_id")
    if not counted:
        return _checked(arguments, given + 1, padded, source)
    if given == padded.value:
        return Claim(given, from_arguments("vocab_size") + " (NullTokenizer)"), []
    claim, notes = _checked(arguments, given + 1, padded, source)
    if claim.value == given + 1:
        notes = [
            f"vocab_size: {given + 1} is used; from Megatron 0.18 NullTokenizer counts its end-of-document token "
            f"in vocab_size = {given}, before it did not. --vocab-size {given} gives the smaller reading"
        ]
    return claim, notes


def _checked(arguments: Arguments, size: int, padded: Claim, source: str) -> tuple[Claim, list[str]]:
    """`size`, provided that padding it gives the saved padded size or the rows that are there."""
    assert isinstance(padded.value, int)
    multiple = (arguments.integer("make_vocab_size_divisible_by") or 128) * (
        arguments.integer("tensor_model_parallel_size") or 1
    )
    expected = -(-size // multiple) * multiple
    if size <= padded.value and expected in (padded.value, arguments.integer("padded_vocab_size")):
        return Claim(size, source), []
    return _unproven(
        padded,
        f"the checkpoint args give {size}, which pads to {expected} (multiple of {multiple}), not to the "
        f"{padded.value} rows of the embedding",
    )


def _unproven(padded: Claim, reason: str) -> tuple[Claim, list[str]]:
    note = f"vocab_size: the padded size {padded.value} is kept, because {reason}; {_GIVE_IT}"
    return Claim(padded.value, f"padded_vocab_size ({padded.source})"), [note]
