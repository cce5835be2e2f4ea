"""What a Hugging Face folder that is named adds to an export, what contradicts it, and how tensors are put in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_export.errors import ExportError
from dist_export.plan.shard import PlannedTensor
from dist_export.targets.huggingface.files import build_index, name_files, split_files
from dist_export.targets.huggingface.reference import Reference, tokenizer_files, without_code
from dist_export.tensors.dtypes import BFLOAT16
from dist_export.tensors.views import View

LLAMA3 = {"rope_type": "llama3", "factor": 8.0}


def merged(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, object]:
    return Reference(Path("/reference"), theirs).merged_config(ours)


def test_code_and_what_an_export_decides_are_not_taken_over() -> None:
    theirs: dict[str, Any] = {"auto_map": {"AutoModel": "a.B"}, "custom_pipelines": {"p": 1}, "torch_dtype": "float32"}
    theirs |= {"dtype": "float32", "transformers_version": "4", "quantization_config": {}}
    theirs |= {"bos_token_id": 1, "hidden_size": 8}
    assert merged(theirs, {"hidden_size": 8, "torch_dtype": "bfloat16"}) == {
        "bos_token_id": 1, "hidden_size": 8, "torch_dtype": "bfloat16"
    }  # fmt: skip


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ({"hidden_size": 16}, {"hidden_size": 8}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 1e4}),
        ({"rope_parameters": {**LLAMA3, "factor": 32.0}}, {"rope_scaling": LLAMA3}),
        ({"rope_parameters": LLAMA3}, {"rope_scaling": None}),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, {"rope_scaling": LLAMA3}),
    ],
)
def test_contradictions_are_refused(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match=rf"contradicts the checkpoint.*{next(iter(ours))} is "):
        merged(theirs, ours)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {"rope_theta": 1e4, "rope_scaling": None}),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 1e4}}, {"rope_theta": 1e4, "rope_scaling": LLAMA3}),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, {"rope_scaling": LLAMA3}),
        ({"sliding_window": None}, {"sliding_window": 4096}),
    ],
)
def test_the_same_in_other_words_is_no_contradiction(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    assert {key: merged(theirs, ours)[key] for key in ours} == ours
    assert "rope_parameters" not in merged(theirs, ours)


def test_tokenizer_files_without_code(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="holds no tokenizer files"):
        tokenizer_files(tmp_path)
    for name in ("qwen.tiktoken", "tokenizer_config.json", "tokenization_qwen.py", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    assert tokenizer_files(tmp_path) == {n: tmp_path / n for n in ("qwen.tiktoken", "tokenizer_config.json")}
    data = json.dumps({"auto_map": {"AutoTokenizer": ["a.B", None]}, "custom_pipelines": {}, "eos_token": "é"}).encode()
    assert json.loads(without_code("tokenizer_config.json", data)) == {"eos_token": "é"}
    assert without_code("tokenizer.model", data) == data
    assert without_code("tokenizer.json", b'{"a":1}') == b'{"a":1}'


def tensors(*sizes: int) -> list[PlannedTensor]:
    views = [View.zeros((size // 2,)) for size in sizes]
    return [PlannedTensor(f"t{n}", BFLOAT16, view, BFLOAT16, ()) for n, view in enumerate(views)]


@pytest.mark.parametrize(
    "sizes, most, expected",
    [
        ((4, 4), 8, [2]),
        ((4, 4, 4, 4), 8, [2, 2]),
        ((4, 4, 4), 8, [2, 1]),
        ((12, 2, 2), 8, [1, 2]),
        ((2, 8, 2), 8, [1, 1, 1]),
        ((), 8, [0]),
    ],
)
def test_files_hold_no_more_than_they_may(sizes: tuple[int, ...], most: int, expected: list[int]) -> None:
    files = split_files(tensors(*sizes), most)
    assert [len(file) for file in files] == expected
    shards = name_files(files)
    if len(files) > 1:
        assert [s.file_name for s in shards.values()] == [
            f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))
        ]
    index: Any = build_index(shards)
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {t.name: shards[n].file_name for n, file in enumerate(files) for t in file}
