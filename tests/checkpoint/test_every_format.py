"""One model in every format: the same configuration, the same export, the same logits."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

from support.every_format import FORMATS, nemo_folder, plain_model, write_legacy  # noqa: E402
from support.exports import run_command  # noqa: E402
from support.other_formats import exported, pack  # noqa: E402
from support.small_models import SmallModel  # noqa: E402
from support.torch_dist import write_torch_dist  # noqa: E402

from dist_export.checkpoint.contents import contents, generation  # noqa: E402
from dist_export.checkpoint.open import open_checkpoint  # noqa: E402

REFERENCE = next(iter(FORMATS))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder, model, made = tmp_path_factory.mktemp("formats"), plain_model(), {}

    def write(name: str) -> Path:
        if name not in made:
            made[name] = FORMATS[name](folder / name, model)
        return made[name]

    yield write


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference") / "out"


@pytest.fixture(scope="module")
def reference(saved: Any, reference_folder: Path) -> dict[str, Any]:
    return exported(saved(REFERENCE), reference_folder, "--tp", 2)


@pytest.mark.parametrize("name", list(FORMATS)[1:])
def test_same_export(name: str, saved: Any, reference: dict[str, Any], tmp_path: Path) -> None:
    assert exported(saved(name), tmp_path / "out", "--tp", 2) == reference


@pytest.mark.parametrize("name", FORMATS)
def test_same_logits(name: str, saved: Any, reference: dict[str, Any], reference_folder: Path) -> None:
    """Megatron-Core's own model, filled by the reader of each format, computes what the export computes."""
    pytest.importorskip("megatron.core")
    from dist_export.verify.logits import verify_logits

    report = verify_logits(saved(name), reference_folder, num_tokens=8)
    assert report.agrees, str(report)
    assert report.difference.relative_difference < 1e-5


INSPECTED = {
    "torch_dist": ("format torch_dist, Megatron-Core 0.10 or later", "iteration 10", "trained as tp1 pp1"),
    "torch_dist-0.19": ("format torch_dist, Megatron-Core 0.19 or later",),
    "zarr": ("format zarr, Megatron-Core 0.10 or later", "also there 1 records of layers that are no weights"),
    "legacy": (
        *("format legacy, Megatron-Core 0.10 or later", "trained as tp2 pp2", "left out 4 tensors, 256 B: optimizer"),
        "4 tensors, 64 B: random number generators",
    ),
    "legacy-before-zip": ("format legacy", "trained as tp2 pp1"),
    "nemo1.nemo": ("format NeMo 1 (torch_dist), NeMo 1.23.0", "also there tokenizer files (0123456789abcdef"),
    "nemo1-zarr.nemo": ("format NeMo 1 (zarr)",),
    "nemo1-ranks.nemo": ("format NeMo 1 (legacy)", "trained as tp2 pp1"),
    "nemo2": ("format NeMo 2 (torch_dist)", "iteration 10", "also there tokenizer files (context/nemo_tokenizer)"),
    "bridge": ("format Megatron-Bridge (torch_dist)", "iteration 10", "also there tokenizer files (tokenizer)"),
    "torch_dcp": ("format torch_dcp, Megatron-Core", "1 tensors, 8.2 kB: optimizer state", "generators of 1 ranks"),
    "fsdp_dtensor": ("format fsdp_dtensor, Megatron-Core", "% of what all its tensors take"),
}


@pytest.mark.parametrize("name", INSPECTED)
def test_what_inspect_says(name: str, saved: Any) -> None:
    said = " ".join(run_command("inspect", saved(name)).stdout.split())
    for words in (*INSPECTED[name], "% of what all its tensors take"):
        assert words in said


def test_inspect_names_quantiser_state(tmp_path: Path) -> None:
    """ModelOpt's and TransformerEngine's, wherever they are (modelopt/torch/opt/plugins/mcore_dist_checkpointing.py,
    transformer_engine/pytorch/module/base.py, `get_extra_state`)."""
    model = plain_model()
    name = "decoder.layers.mlp.linear_fc1._extra_state/shard_{}_2"
    states = {
        "empty, TransformerEngine 2": torch.zeros(0, dtype=torch.uint8),
        "empty, TransformerEngine 1": io.BytesIO(saved_bytes(None)),
        "empty, local layers": None,
        "quantiser state, TransformerEngine 2": torch.zeros(500, dtype=torch.uint8),
        "quantiser state, TransformerEngine 1": io.BytesIO(saved_bytes({"scale_fwd": torch.ones(2048)})),
    }
    for number, (expected, state) in enumerate(states.items()):
        folder = write_torch_dist(
            tmp_path / str(number),
            model.tensors,
            args=model.args,
            extra_objects={name.format(layer): [state] for layer in range(2)},
        )
        (line,) = contents(open_checkpoint(folder).index)
        assert line.startswith("2 records of layers that are no weights (_extra_state): " + expected.partition(",")[0])
    (folder / "modelopt_state").mkdir()
    assert contents(open_checkpoint(folder).index)[1:] == ["quantiser state (modelopt_state)"]
    legacy = write_legacy(tmp_path / "legacy", model, modelopt_state={"modelopt_state_dict": [], "version": "0.29"})
    assert "quantiser state (modelopt_state)" in open_checkpoint(legacy).index.ignored
    archive = pack(folder_with_quantisers(tmp_path / "nemo", model), tmp_path / "m.nemo")
    assert "quantiser state (modelopt_state)" in contents(open_checkpoint(archive).index)


def folder_with_quantisers(folder: Path, model: SmallModel) -> Path:
    nemo_folder(folder, model)
    (folder / "model_weights" / "modelopt_state").mkdir()
    (folder / "model_weights" / "modelopt_state" / "metadata.json").write_text("{}")
    return folder


def saved_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_classic_model_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(FORMATS["legacy-classic"](tmp_path / "c", plain_model(use_legacy_models=True)))
    said = generation(checkpoint.index, checkpoint.arguments)
    assert said == "Megatron-Core 0.10 or later, classic model (megatron.legacy.model)"
