"""Texts to calibrate or evaluate with, from local files: JSON lines, a datasets folder, or lines of token ids.

Importing this module imports nothing else; transformers and datasets are imported when they are needed.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from dist_export.errors import ExportError, Faults

TEXT_FIELDS = ("text", "article", "document", "content")
"""Names that data sets have for a text; cnn_dailymail has ``article`` and ``highlights``."""
SUMMARY_FIELDS = ("summary", "highlights")
TOKEN_FIELDS = ("tokens", "input_ids")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class Sample(Struct, frozen=True):
    """One entry of a data set: a text, or its token ids."""

    text: str | None = None
    tokens: tuple[int, ...] | None = None
    summary: str | None = None
    """What a person wrote as the summary of the text."""


def read_samples(paths: Sequence[Path], *, limit: int | None = None, text_field: str | None = None) -> list[Sample]:
    """The first `limit` samples of the files and folders, in their order.

    A ``.json`` or ``.jsonl`` file has one object per line, with a text (`TEXT_FIELDS`, or `text_field`) or token ids
    (`TOKEN_FIELDS`), and perhaps a summary; a folder is what ``datasets`` saved (``save_to_disk``); any other file has
    token ids, one sequence per line. Raises `ExportError` naming file and line.
    """
    samples: list[Sample] = []
    for path in paths:
        for sample in _samples(path, text_field):
            if limit is not None and len(samples) >= limit:
                break
            samples.append(sample)
    if not samples:
        raise ExportError(f"{', '.join(map(str, paths))}: no texts and no token ids")
    return samples


def _samples(path: Path, text_field: str | None) -> Iterator[Sample]:
    if path.is_dir():
        for number, row in enumerate(_rows(path)):
            yield _sample(row, f"{path}, row {number}", text_field)
        return
    try:
        with path.open(encoding="utf-8") as file:
            read = _json_line if path.suffix in (".jsonl", ".json") else _token_line
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield read(line, f"{path}, line {number}", text_field)
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{path}: cannot be read: {error}") from error


def _json_line(line: str, place: str, text_field: str | None) -> Sample:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ExportError(f"{place}: not JSON ({error}); expected one object per line") from error
    if not isinstance(row, dict):
        raise ExportError(f"{place}: expected an object with a text or token ids")
    return _sample(row, place, text_field)


def _token_line(line: str, place: str, _: str | None) -> Sample:
    try:
        return Sample(tokens=tuple(int(word) for word in line.replace(",", " ").split()))
    except ValueError as error:
        raise ExportError(f"{place}: expected token ids; a file of texts must be .jsonl") from error


def _sample(row: Mapping[str, Any], place: str, text_field: str | None) -> Sample:
    summary = next((row[name] for name in SUMMARY_FIELDS if isinstance(row.get(name), str)), None)
    for name in (text_field,) if text_field else TEXT_FIELDS:
        if isinstance(row.get(name), str):
            return Sample(text=row[name], summary=summary)
    for name in TOKEN_FIELDS:
        tokens = row.get(name)
        if isinstance(tokens, list) and all(type(token) is int for token in tokens):
            return Sample(tokens=tuple(tokens), summary=summary)
    names = (text_field,) if text_field else (*TEXT_FIELDS, *TOKEN_FIELDS)
    raise ExportError(f"{place}: has none of {', '.join(names)}; its fields are {', '.join(map(str, row))}")


def _rows(folder: Path) -> Iterable[Mapping[str, Any]]:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ExportError(f"{folder}: a datasets folder is read by datasets; run: pip install datasets") from error
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder}: not a folder of datasets' save_to_disk: {error}") from error
    rows: Iterable[Mapping[str, Any]] = found[next(iter(found))] if isinstance(found, dict) else found
    return rows


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer in `folder`. Nothing is downloaded and no code of the folder is run.

    Raises `ExportError` when transformers is missing or finds no tokenizer.
    """
    if not has_tokenizer(folder):
        raise ExportError(f"{folder}: has no tokenizer; name a folder that has one with --tokenizer, or give token ids")
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ExportError("texts are cut into tokens by transformers; run: pip install 'dist-export[hf]'") from error
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"{folder}: transformers cannot load its tokenizer: {error}") from error


def token_ids(samples: Sequence[Sample], tokenizer: Any, *, vocab_size: int, length: int) -> list[list[int]]:
    """The first `length` token ids of every sample; samples of fewer than two are faults.

    `tokenizer` is None where there is none. Raises `ExportError` naming the samples.
    """
    faults, result = Faults("samples that cannot be used"), []
    for number, sample in enumerate(samples):
        if sample.tokens is None and tokenizer is None:
            raise ExportError("the data are texts: name a folder with a tokenizer (--tokenizer), or give token ids")
        ids = list(sample.tokens if sample.tokens is not None else tokenizer(sample.text)["input_ids"])[:length]
        wrong = [each for each in ids if not 0 <= each < vocab_size]
        if wrong:
            faults.add(f"sample {number}: token ids {wrong[:3]} are outside the vocabulary of {vocab_size}")
        elif len(ids) < 2:
            faults.add(f"sample {number}: has {len(ids)} tokens, at least 2 are needed")
        result.append(ids)
    faults.raise_if_any()
    return result


def equal_lengths(sequences: Sequence[list[int]], size: int) -> Iterator[list[list[int]]]:
    """Sequences in their order, up to `size` neighbours of one length at a time: nothing is padded."""
    batch: list[list[int]] = []
    for sequence in sequences:
        if batch and (len(batch) == size or len(sequence) != len(batch[0])):
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch
