"""However a model was spread over ranks in training and whichever way it was saved, its exports are the same bytes.

Small real models of Megatron-Core, all of one seed; the one saved by a single rank is what the others must equal.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from support.exports import REPOSITORY
from support.legacy import ITERATION, assert_same, expected_tensors, rank_files, save_again, save_models

from dist_export.checkpoint.legacy import read_index
from dist_export.checkpoint.legacy_files import read_rank_state
from dist_export.checkpoint.open import open_checkpoint
from dist_export.checkpoint.torch_dist import parse_index
from dist_export.errors import ExportError
from dist_export.models.catalog import SourceCatalog

BOTH: dict[str, dict[str, Any]] = {
    "pp2 vpp2": {"pp": 2, "vpp": 2},
    "ep2": {"ep": 2},
    "tp2 ep2": {"tp": 2, "ep": 2},
    "tp2 ep2 etp1": {"tp": 2, "ep": 2, "etp": 1},
    "tp2 ep2 etp1 optimizer": {"tp": 2, "ep": 2, "etp": 1, "optimizer": True},
    "tp4 ep2 etp2": {"tp": 4, "ep": 2, "etp": 2},
    "tp2 pp2 vpp2": {"tp": 2, "pp": 2, "vpp": 2},
    "tp2 pp2 vpp2 ep2 etp1 optimizer": {"tp": 2, "pp": 2, "vpp": 2, "ep": 2, "etp": 1, "optimizer": True},
    "grouped tp2 ep2 optimizer": {"grouped": True, "tp": 2, "ep": 2, "optimizer": True},
    "grouped pp2 vpp2 ep2": {"grouped": True, "pp": 2, "vpp": 2, "ep": 2},
    "grouped one expert per rank": {"grouped": True, "ep": 4},
    "three layers and one": {"pp": 2, "first_stage_layers": 3},
    "none, two, one and one": {"pp": 2, "vpp": 2, "pipeline_layout": "E|tt|t|tL"},
    "last stage without layers": {"pp": 3, "pipeline_layout": "Ett|tt|L"},
    "a key per layer as the list of MoE layers makes it": {"ep": 2, "moe_layers": "1111"},
}
DISTRIBUTED: dict[str, dict[str, Any]] = {
    "etp2": {"etp": 2},
    "per layer": {"ep": 2, "per_layer": True},
    "singleton": {"tp": 2, "ep": 2, "etp": 1, "singleton": True},
    "grouped singleton optimizer": {"grouped": True, "ep": 2, "singleton": True, "optimizer": True},
}
#: Models that no test here exports: only what is read of them is compared.
SOURCES: dict[str, dict[str, Any]] = {
    "dense first": {"moe_layers": "0111", "shared_expert_ffn": 32, "shared_expert_gate": True},
    "mtp": {"mtp_layers": 1},
    "mla": {"kv_lora_rank": 12, "q_lora_rank": 16, "rope_head_size": 4},
    "norms and biases of q, k, v": {"qk_norm": True, "qkv_bias": True},
}
SOURCE_LAYOUT = {"tp": 2, "pp": 2, "ep": 2, "etp": 1}
EXPORTS = (("--target", "trtllm", "--target", "hf"), ("--tp", "2"), ("--tp", "2", "--moe-ep", "2"))
PROGRAM = """
import sys
from dist_export.cli import main
checkpoint, output, *lines = sys.argv[1:]
codes = [main(["export", checkpoint, f"{output}/{n}", "--num-processes", "1", *line.split()])
         for n, line in enumerate(lines)]
sys.exit(any(codes))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of NAME/legacy and NAME/torch_dist."""
    only = {"formats": ["torch_dist"]}
    models = {"one rank": only, **BOTH, **{name: {**layout, **only} for name, layout in DISTRIBUTED.items()}}
    models |= {name: {**model, **SOURCE_LAYOUT} for name, model in SOURCES.items()}
    models |= {f"{name}, one rank": {**model, **only} for name, model in SOURCES.items()}
    folder = tmp_path_factory.mktemp("layouts")
    save_models(folder, {name: {"style": "mixtral", **options} for name, options in models.items()})
    return folder


def digests(checkpoint: Path, output: Path) -> dict[str, str]:
    """SHA-256 of the weights and configurations of every export of EXPORTS."""
    output.mkdir()
    lines = [" ".join(options) for options in EXPORTS]
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), str(output), *lines]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stdout + process.stderr
    paths = [*output.rglob("*.safetensors"), *output.rglob("config.json")]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def expected(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = digests(saved / "one rank" / "torch_dist", tmp_path_factory.mktemp("expected") / "out")
    assert len(found) == 2 + 2 + 3 + 3  # two targets; twice two ranks
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, kind) for name in BOTH for kind in ("legacy", "torch_dist")), *((n, "torch_dist") for n in DISTRIBUTED)],
)
def test_same_exports_as_of_one_rank(
    saved: Path, expected: dict[str, str], name: str, kind: str, tmp_path: Path
) -> None:
    assert digests(saved / name / kind, tmp_path / "out") == expected


@pytest.mark.parametrize("name", SOURCES)
def test_same_tensors_as_torch_dist_and_as_one_rank(saved: Path, name: str) -> None:
    spread = expected_tensors(saved / name)
    alone = expected_tensors(saved / f"{name}, one rank")
    assert spread.keys() == alone.keys()
    assert all(spread[key].equal(alone[key]) for key in alone)
    assert_same(read_index(saved / name / "legacy" / ITERATION), spread)


@pytest.mark.parametrize("kind", ["legacy", "torch_dist"])
def test_dense_layers_among_layers_of_experts(saved: Path, kind: str) -> None:
    catalog = SourceCatalog(open_checkpoint(saved / "dense first" / kind).index.shapes())
    layer = "decoder.layers.{layer}.mlp."
    dense = [catalog.find(layer + "linear_fc2.weight", layer=number) is not None for number in range(4)]
    assert (catalog.num_layers, catalog.num_experts(), dense) == (4, 4, [True, False, False, False])
    for expert in range(4):
        found = catalog.find(layer + "experts.experts.{expert}.linear_fc1.weight", layer=3, expert=expert)
        assert found is not None
        assert found.shape == (256, 64)
    shared = catalog.find(layer + "shared_experts.linear_fc1.weight", layer=1)
    assert shared is not None
    assert shared.shape == (64, 64)
    assert catalog.find(layer + "experts.experts.{expert}.linear_fc1.weight", layer=0, expert=0) is None


def test_the_layouts_are_those_they_are_called(saved: Path) -> None:
    folders = {path.parent.name for path in rank_files(saved / "tp2 pp2 vpp2 ep2 etp1 optimizer" / "legacy")}
    assert folders == {"mp_rank_00_000_000", "mp_rank_01_000_001", "mp_rank_00_001_000", "mp_rank_01_001_001"}
    folders = {path.parent.name for path in rank_files(saved / "tp4 ep2 etp2" / "legacy")}
    assert folders == {"mp_rank_00_000", "mp_rank_01_000", "mp_rank_02_001", "mp_rank_03_001"}
    fc1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    for name, size in (("tp2 ep2", (1, 1, 64, 64)), ("grouped tp2 ep2 optimizer", (1, 2, 64, 64))):
        index = open_checkpoint(saved / name / "torch_dist").index
        assert {chunk.box.size for chunk in index.chunks(fc1)} == {size}
    grouped = open_checkpoint(saved / "grouped tp2 ep2 optimizer" / "torch_dist").index
    num_elements = sum(math.prod(info.shape) for info in grouped.tensors.values())
    assert grouped.ignored["optimizer state"].num_bytes == 3 * 4 * num_elements  # two moments and fp32 weights


@pytest.mark.parametrize("kind", ["legacy", "torch_dist"])
def test_an_optimizer_costs_no_reads_but_of_its_description(saved: Path, kind: str, tmp_path: Path) -> None:
    """Counted by the system while parsing, by the export itself while exporting."""
    saves = [saved / name / kind for name in ("tp2 ep2 etp1", "tp2 ep2 etp1 optimizer")]
    read, parsed = [], []
    for number, save in enumerate(saves):
        digests(save, tmp_path / str(number))
        manifest = json.loads((tmp_path / str(number) / "1" / "export_manifest.json").read_text())
        read.append([process["bytes_read"] for process in manifest["run"]["processes"]])
        before = bytes_read_by_calls()
        parse(save / ITERATION)
        parsed.append(bytes_read_by_calls() - before)
    assert read[0] == read[1]
    described = [num_description_bytes(save / ITERATION) for save in saves]
    assert described[0] / 2 < parsed[0]
    ends = 2 * 2 * 4096  # of each of the two files; what lies within them is not read again
    assert parsed[1] - parsed[0] <= described[1] - described[0] + ends
    assert parsed[1] < 0.25 * open_checkpoint(saves[0]).index.num_weight_bytes


def parse(folder: Path) -> None:
    """Whatever says what is where, in this process."""
    if (folder / ".metadata").exists():
        parse_index(folder)
    for number, path in enumerate(rank_files(folder)):
        read_rank_state(path, number)


def bytes_read_by_calls() -> int:
    """Of this process so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def num_description_bytes(folder: Path) -> int:
    """Bytes that say what is where: pickles, zip directories and headers, or the metadata and the common state."""
    if (folder / ".metadata").exists():
        return sum((folder / name).stat().st_size for name in (".metadata", "common.pt"))
    total = 0
    for path in rank_files(folder):
        with zipfile.ZipFile(path) as archive:
            headers = sum(30 + len(entry.filename) for entry in archive.infolist())
            pickle = archive.getinfo("model_optim_rng/data.pkl").file_size
            total += pickle + path.stat().st_size - archive.start_dir + headers
    return total


def test_experts_of_a_missing_folder(saved: Path, tmp_path: Path) -> None:
    save = shutil.copytree(saved / "tp2 ep2" / "legacy" / ITERATION, tmp_path / "save")
    shutil.rmtree(save / "mp_rank_01_001")
    message = (
        r"experts of ep rank 1, stage 0 are split over 2 ranks, but the folders of expert-tp ranks \[1\] are missing"
    )
    with pytest.raises(ExportError, match=message):
        read_index(save)
    shutil.rmtree(save / "mp_rank_00_001")
    with pytest.raises(ExportError, match="no folder holds the experts of ep rank 1 of pipeline stage 0; copy it"):
        read_index(save)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"expert_tensor_parallel_size": 3},
            "3 does not divide tp 4: ranks with different expert shards wrote",
        ),
        ({"tensor_model_parallel_size": 5}, "mp_rank_04 is missing: .* 0.10 to 0.17 never wrote them"),
        (
            {"num_experts": 3},
            "3 experts cannot be shared by ep 2",
        ),
    ],
)
def test_saved_layouts_that_the_files_contradict(
    saved: Path, change: dict[str, int], message: str, tmp_path: Path
) -> None:
    def contradict(state: dict[str, Any]) -> None:
        vars(state["args"]).update(change)
        if "num_experts" in change:
            for name in [name for name in state["model"] if name.endswith("router.weight")]:
                del state["model"][name]

    save = save_again(saved / "tp4 ep2 etp2" / "legacy", tmp_path / "save", contradict)
    with pytest.raises(ExportError, match=message):
        read_index(save / ITERATION)
