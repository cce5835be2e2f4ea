"""What runs a checkpoint and its exports refuses whatever it would have to guess, and says what is wrong."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402
from support.exports import config_of, export, tensors_of  # noqa: E402
from support.small_models import GPT, LLAMA, SmallModel, small_model  # noqa: E402
from support.torch_dist import write_torch_dist  # noqa: E402

from dist_export.checkpoint.index import Chunk  # noqa: E402
from dist_export.checkpoint.index_builder import IndexBuilder  # noqa: E402
from dist_export.errors import ExportError  # noqa: E402
from dist_export.tensors.boxes import Box  # noqa: E402
from dist_export.verify.logits import verify_logits  # noqa: E402
from dist_export.verify.records import read_box  # noqa: E402
from dist_export.verify.trtllm_interpreter import run_trtllm  # noqa: E402

needs_megatron = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is missing")
TOKENS = torch.arange(12).reshape(2, 6)


def write(folder: Path, model: SmallModel) -> Path:
    return write_torch_dist(folder, model.tensors, args=model.args)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`exported("llama")`: a tp2 export of a small model, not to be changed."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = small_model({"llama": LLAMA, "gpt": GPT}[family], scale=0.15)
            made[family] = export(write(folder / "checkpoint", model), folder / "out", "--tp", 2)
        return made[family]

    return get


def changed(output: Path, folder: Path, *, tensors: Callable[[dict[str, torch.Tensor]], None] | None = None,
            config: dict[str, object] | None = None) -> Path:  # fmt: skip
    """A copy of an export with its second rank's tensors or its config.json edited."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config_of(output), **(config or {})}))
    for rank in range(2):
        values = tensors_of(output / f"rank{rank}.safetensors")
        if rank == 1 and tensors is not None:
            tensors(values)
        save_file(values, folder / f"rank{rank}.safetensors")
    return folder


def test_bfloat16_is_close_to_float32(exported: Callable[[str], Path]) -> None:
    exact, rounded = (run_trtllm(exported("llama"), TOKENS, dtype=d) for d in (torch.float32, torch.bfloat16))
    assert exact.logits is not None
    assert rounded.logits is not None
    assert exact.logits.shape == (2, 6, 64)
    error = (exact.logits - rounded.logits).abs().max() / exact.logits.std()
    assert 1e-5 < error < 0.1


def test_a_token_sees_nothing_after_it(exported: Callable[[str], Path]) -> None:
    whole, part = run_trtllm(exported("gpt"), TOKENS), run_trtllm(exported("gpt"), TOKENS[:, :3])
    torch.testing.assert_close(whole.logits[:, :3], part.logits, rtol=1e-5, atol=1e-6)


NAME = "transformer.layers.1.mlp.fc.weight"
TENSOR_FAULTS = {
    "missing": (lambda t: t.pop(NAME), f"rank1.safetensors: {NAME} is missing"),
    "extra": (
        lambda t: t.update({"transformer.layers.2.mlp.fc.weight": torch.zeros(1)}),
        "rank1.safetensors: transformer.layers.2.mlp.fc.weight is not a tensor of this rank",
    ),
    "shape": (
        lambda t: t.update({NAME: t[NAME][1:].clone()}),
        r"fc.weight is BF16 \[23, 32\], expected BF16 \[24, 32\]",
    ),
    "dtype": (lambda t: t.update({NAME: t[NAME].float()}), r"fc.weight is F32 \[24, 32\], expected BF16 \[24, 32\]"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_rank_file_that_an_engine_would_not_load(fault: str, exported: Callable[[str], Path], tmp_path: Path) -> None:
    change, message = TENSOR_FAULTS[fault]
    with pytest.raises(ExportError, match=message):
        run_trtllm(changed(exported("llama"), tmp_path / "out", tensors=change), TOKENS)


def test_a_missing_and_a_cut_file(exported: Callable[[str], Path], tmp_path: Path) -> None:
    folder = changed(exported("llama"), tmp_path / "out")
    (folder / "rank0.safetensors").unlink()
    (folder / "rank1.safetensors").write_bytes((folder / "rank1.safetensors").read_bytes()[:-4])
    with pytest.raises(ExportError, match=r"2 faults(.|\n)*rank0.safetensors: (.|\n)*rank1.safetensors: "):
        run_trtllm(folder, TOKENS)


QUANTIZED = {"quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}
CONFIG_FAULTS = {
    "llama": [
        ({"architecture": "MambaForCausalLM"}, "architecture MambaForCausalLM"),
        ({"hidden_act": "swiglu"}, "hidden_act swiglu of LlamaForCausalLM"),
        ({"position_embedding_type": "rope_gptj"}, "position_embedding_type rope_gptj of LlamaForCausalLM"),
        ({"quantization": QUANTIZED}, r"quantization.quant_algo FP8(.|\n)*quantization.kv_cache_quant_algo INT8"),
        ({"rotary_scaling": {"type": "dynamic", "factor": 2}}, "rotary_scaling .*dynamic"),
        ({"moe": {"num_experts": 8, "top_k": 2}}, r"moe.normalization_mode None(.|\n)*hidden_act silu of Llama"),
        ({"architecture": "Qwen2ForCausalLM", "qwen_type": "qwen"}, "qwen_type qwen"),
        ({"qk_layernorm": True}, "qk_layernorm true"),
        ({"mapping": {"world_size": 4, "tp_size": 2, "pp_size": 1}}, "world_size that is not tp_size x pp_size"),
        ({"mapping": None}, "has no mapping"),
    ],
    "gpt": [({"embedding_scale": 2.0, "hidden_act": "quick_gelu"}, "hidden_act quick_gelu of GPTForCausalLM")],
}


@pytest.mark.parametrize(
    "family, change, message", [(f, *case) for f, cases in CONFIG_FAULTS.items() for case in cases]
)
def test_a_config_that_is_not_interpreted(
    family: str, change: dict[str, object], message: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        run_trtllm(changed(exported(family), tmp_path / "out", config=change), TOKENS)


@needs_megatron
def test_a_checkpoint_that_is_not_the_configured_model(tmp_path: Path) -> None:
    model = small_model(LLAMA, scale=0.15)
    output = export(write(tmp_path / "checkpoint", model), tmp_path / "out")
    del model.tensors["decoder.final_layernorm.weight"]
    model.tensors["decoder.layers.mlp.extra.weight"] = torch.zeros(2, 32, dtype=torch.bfloat16)
    message = r"2 faults\n.*decoder.final_layernorm.weight is missing\n.*mlp.extra.weight is not part of the model"
    with pytest.raises(ExportError, match=message):
        verify_logits(write(tmp_path / "other", model), output)


@needs_megatron
def test_more_tokens_than_the_model_has_positions(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "checkpoint", small_model(GPT, scale=0.15))
    output = export(checkpoint, tmp_path / "out")
    assert verify_logits(checkpoint, output, num_tokens=100).difference.num_tokens == 64
    with pytest.raises(ExportError, match=r"65 tokens are more than .* \(64\); give fewer"):
        verify_logits(checkpoint, output, tokens=[[0] * 65])


@needs_megatron
def test_a_cut_record_is_named(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "checkpoint", small_model(LLAMA, scale=0.15))
    output = export(checkpoint, tmp_path / "out")
    (path,) = checkpoint.glob("*.distcp")
    data = bytearray(path.read_bytes())
    data[-64:] = bytes(64)  # the directory of the last record's zip
    path.write_bytes(data)
    with pytest.raises(ExportError, match=r"__0_0.distcp: output_layer.weight at byte \d+ cannot be read"):
        verify_logits(checkpoint, output)


@needs_megatron
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is missing")
def test_a_hugging_face_folder_must_hold_every_tensor_and_no_other(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "checkpoint", small_model(LLAMA, scale=0.15))
    output = export(checkpoint, tmp_path / "out", "--target", "hf")
    values = tensors_of(output / "model.safetensors")
    values["model.layers.0.mlp.extra"] = values.pop("model.norm.weight")
    save_file(values, output / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"model.norm.weight is missing\n.*model.layers.0.mlp.extra is unexpected"):
        verify_logits(checkpoint, output)


CALLS = {
    "megatron": ("megatron_environment.megatron_on_cpu().__enter__()", "megatron-core"),
    "transformers": ("huggingface_adapter._load(Path('.'), None)", "transformers"),
}


@pytest.mark.parametrize("package", CALLS)
def test_a_missing_package_is_named_with_the_command_that_installs_it(package: str) -> None:
    """In a process where the package cannot be imported."""
    call, wanted = CALLS[package]
    program = f"""
import sys
sys.modules["{package}"] = None
from pathlib import Path
from dist_export.errors import ExportError
from dist_export.verify import huggingface_adapter, megatron_environment
try:
    {call}
except ExportError as error:
    print(error)
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert f"run: pip install {wanted}" in process.stdout, process.stderr


@pytest.mark.parametrize("transposed", [False, True], ids=["row-major", "strides"])
def test_bare_elements_are_read_where_they_lie(transposed: bool, tmp_path: Path) -> None:
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    builder = IndexBuilder(tmp_path, "bare", chunks_are_records=False)
    chunks = []
    with (tmp_path / "data").open("wb") as file:
        for row in (0, 3):
            part = values[row : row + 3]
            stored = part.T.contiguous() if transposed else part
            strides = (4, 12) if transposed else None
            chunks.append(Chunk(Box((row, 0), (3, 4)), builder.file("data"), file.tell(), 48, strides))
            file.write(stored.contiguous().numpy().tobytes())
    builder.add("weight", (6, 4), "float32", chunks)
    read = read_box(builder.build(), "weight", Box((1, 1), (4, 2)))
    torch.testing.assert_close(read, values[1:5, 1:3], rtol=0, atol=0)
