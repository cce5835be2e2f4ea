"""A real Hugging Face tokenizer of a few words, as a folder."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = ("<unk>", "</s>", "the", "cat", "sat", "on", "a", "mat", "dog", "ran", "to", "house", "red", "and")


def save_tokenizer(folder: Path, *, size: int = 250) -> Path:
    """A tokenizer with one token per word, `size` in all; id 1 ends a text."""
    import tokenizers

    words = [*WORDS, *(f"word{number}" for number in range(len(WORDS), size))]
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
