"""Bad input through the real commands: one message that says what to do, a non-zero exit, and nothing left behind.

Every fault is met twice: by two processes that export to a new folder, and by one that would replace an export that
is there, which must stay as it was to the byte.
"""

from __future__ import annotations

import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from support.exports import REPOSITORY, export, run_command  # noqa: E402
from support.small_models import LLAMA, small_model  # noqa: E402
from support.torch_dist import (  # noqa: E402
    change_args,
    megatron_chunks,
    read_metadata,
    write_metadata,
    write_torch_dist,
)

QKV = "decoder.layers.self_attention.linear_qkv.weight"
MODEL = small_model(LLAMA, num_layers=4)
Fault = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a fault. Copied, never changed."""
    folder = tmp_path_factory.mktemp("whole") / "iter_0000010"
    return write_torch_dist(folder, MODEL.tensors, args=MODEL.args, chunks=megatron_chunks(tp=2))


@pytest.fixture(scope="module")
def earlier_export(whole_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(whole_checkpoint, tmp_path_factory.mktemp("earlier") / "out", "--num-processes", 1)


@pytest.fixture
def checkpoint(whole_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole_checkpoint, tmp_path / "iter_0000010"))


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes (None for a folder)."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def check_refusal(process: subprocess.CompletedProcess[str], message: str) -> None:
    """One error, of bad input, without a traceback, that matches `message`."""
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    assert process.stderr.startswith("dist-export: error: "), process.stderr
    assert process.stderr.count("dist-export: ") == 1, process.stderr
    assert re.search(message, process.stderr), process.stderr


def refused(checkpoint: Path, tmp_path: Path, earlier_export: Path, message: str, *arguments: object) -> None:
    """The export fails as it should, to a new folder and over an export."""
    new, replaced = tmp_path / "new", tmp_path / "replaced"
    new.mkdir()
    check_refusal(run_command("export", checkpoint, new / "out", "--num-processes", 2, *arguments), message)
    assert contents(new) == {}
    shutil.copytree(earlier_export, replaced / "out")
    before = contents(replaced)
    process = run_command("export", checkpoint, replaced / "out", "--overwrite", "--num-processes", 1, *arguments)
    check_refusal(process, message)
    assert contents(replaced) == before


# --- files that are missing, cut or foreign ---------------------------------------------------------------------


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _foreign(folder: Path) -> None:
    _empty(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 64)


def _no_metadata_json(folder: Path) -> None:
    (folder / "metadata.json").unlink()


def _other_backend(folder: Path) -> None:
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr2", "sharded_backend_version": 1}')


def _cut(name: str, share: float) -> Fault:
    def fault(folder: Path) -> None:
        os.truncate(folder / name, int((folder / name).stat().st_size * share))

    return fault


def _remove(name: str) -> Fault:
    return lambda folder: (folder / name).unlink()


def _tracker_of_nothing(folder: Path) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text("77")


def _broken_record(folder: Path) -> None:
    """The head of one record is overwritten: sizes and metadata stay right, so only execution can notice."""
    place = next(info for index, info in read_metadata(folder).storage_data.items() if index.fqn == QKV)
    with (folder / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\xff" * 64)


FILE_FAULTS = {
    "empty folder": (_empty, r"not a Megatron checkpoint \(no latest_checkpointed_iteration.txt, no metadata.json\)"),
    "not a checkpoint": (_foreign, r"iter_0000010: not a Megatron checkpoint"),
    "unfinished save": (_no_metadata_json, r"has .metadata but no metadata.json.*the save did not finish"),
    "other format": (_other_backend, r"metadata.json names no format that can be read; torch_dist and zarr can"),
    "truncated .distcp": (_cut("__1_0.distcp", 0.7), r"__1_0.distcp: has \d+ bytes, needs \d+; the file is truncated"),
    "empty .distcp": (_cut("__0_0.distcp", 0), r"__0_0.distcp: has 0 bytes, needs \d+; the file is truncated"),
    "missing .distcp": (_remove("__1_0.distcp"), r"files named by .*metadata cannot be read: __1_0.distcp: No such"),
    "missing .metadata": (_remove(".metadata"), r"\.metadata: No such file.*unfinished or not all of it was copied"),
    "cut .metadata": (_cut(".metadata", 0.5), r"\.metadata: .* announces \d+ bytes, \d+ are left"),
    "empty .metadata": (_cut(".metadata", 0), r"\.metadata: .*(cut|truncated|malformed|ends|empty)"),
    "cut common.pt": (_cut("common.pt", 0.5), r"common.pt: does not end as a zip does: it is cut"),
    "iteration of the tracker": (_tracker_of_nothing, r"iter_0000077: no such folder; .* holds no iterations"),
    "damaged record": (_broken_record, r"__0_0.distcp: is not a zip as torch.save writes it"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_files(fault: str, checkpoint: Path, tmp_path: Path, earlier_export: Path) -> None:
    damage, message = FILE_FAULTS[fault]
    damage(checkpoint)
    refused(checkpoint, tmp_path, earlier_export, message)


def test_no_such_folder_a_file_and_an_iteration_that_is_not_there(
    checkpoint: Path, tmp_path: Path, earlier_export: Path
) -> None:
    (tmp_path / "a").mkdir()
    refused(tmp_path / "nowhere", tmp_path / "a", earlier_export, "nowhere: no such file or folder")
    (tmp_path / "b").mkdir()
    message = "common.pt: not a folder and not a .nemo archive; give a Megatron --save"
    refused(checkpoint / "common.pt", tmp_path / "b", earlier_export, message)
    (tmp_path / "c").mkdir()
    message = r"iter_0000011: no such folder; .* holds iter_0000010"
    refused(checkpoint.parent, tmp_path / "c", earlier_export, message, "--iteration", 11)


# --- tensors that do not make the model --------------------------------------------------------------------------


def _without(*names: str) -> Fault:
    """The keys are gone from ``.metadata``, as if they had never been saved."""

    def fault(folder: Path) -> None:
        metadata = read_metadata(folder)
        for name in names:
            del metadata.state_dict_metadata[name]
        metadata.storage_data = {i: info for i, info in metadata.storage_data.items() if i.fqn not in names}
        write_metadata(folder, metadata)

    return fault


def _without_a_record(folder: Path) -> None:
    metadata = read_metadata(folder)
    index = next(index for index in metadata.storage_data if index.fqn == QKV)
    del metadata.storage_data[index]
    write_metadata(folder, metadata)


def _without_a_chunk(folder: Path) -> None:
    metadata = read_metadata(folder)
    metadata.state_dict_metadata[QKV].chunks.pop()
    write_metadata(folder, metadata)


def _replace_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Fault:
    def fault(folder: Path) -> None:
        tensors = dict(MODEL.tensors)
        change(tensors)
        shutil.rmtree(folder)
        write_torch_dist(folder, tensors, args=MODEL.args)

    return fault


def _per_layer_without_layer_2(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()
    tensors |= MODEL.per_layer()
    del tensors["decoder.layers.2.mlp.linear_fc2.weight"]


def _fewer_rows(tensors: dict[str, torch.Tensor]) -> None:
    tensors[QKV] = tensors[QKV][:, :-8].clone()


TENSOR_FAULTS = {
    "missing tensor": (
        _without("decoder.layers.mlp.linear_fc2.weight"),
        r"missing tensor of layer 0: the checkpoint has no decoder.layers.\{layer\}.mlp.linear_fc2.weight",
    ),
    "missing norm": (
        _without("decoder.final_layernorm.weight"),
        r"transformer.ln_f.weight: missing tensor: the checkpoint has no decoder.final_layernorm.weight",
    ),
    "missing head": (
        _without("output_layer.weight"),
        r"tied_embeddings: .*untie_embeddings_and_output_weights.* says false, .*output_layer.weight.* proves true",
    ),
    "missing in one layer": (
        _replace_tensors(_per_layer_without_layer_2),
        r"missing tensor of layer 2: the checkpoint has no decoder.layers.\{layer\}.mlp.linear_fc2.weight",
    ),
    "missing record": (_without_a_record, r"linear_qkv.weight: chunk .* has no record in any file"),
    "missing chunk": (_without_a_chunk, r"linear_qkv.weight: \d+ of \d+ elements are not covered"),
    "surplus tensor": (
        _replace_tensors(lambda t: t.update({"decoder.layers.surplus.weight": torch.zeros(4, 8, 8)})),
        r"no place for: unexpected tensor decoder.layers.\{layer\}.surplus.weight",
    ),
    "surplus bias": (
        _replace_tensors(lambda t: t.update({"decoder.layers.mlp.linear_fc2.bias": torch.zeros(4, 32)})),
        r"linear_bias: tensors .*linear_fc2.bias are present, but .*linear_proj.* have no bias",
    ),
    "shape of qkv": (
        _replace_tensors(_fewer_rows),
        r"num_query_groups 2 .* make 64 rows, but .*linear_qkv.weight is \(56, 32\).*correct them with --set",
    ),
    "same weight twice": (
        _replace_tensors(lambda t: t.update({"decoder.final_norm.weight": torch.zeros(32)})),
        r"decoder.final_layernorm.weight and decoder.final_norm.weight both hold final_norm.weight; keep one",
    ),
    "weight that is no number": (
        _replace_tensors(lambda t: t.update({QKV: torch.zeros(t[QKV].shape, dtype=torch.complex64)})),
        r"linear_qkv.weight: unknown element type 'complex64'",
    ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensors(fault: str, checkpoint: Path, tmp_path: Path, earlier_export: Path) -> None:
    damage, message = TENSOR_FAULTS[fault]
    damage(checkpoint)
    refused(checkpoint, tmp_path, earlier_export, message)


ARGUMENT_FAULTS = {
    "hidden_size": (48, r"hidden_size: .*says 48, .* proves 32; if the tensors are right, give --set hidden_size=32"),
    "num_layers": (5, r"num_layers: .*says 5, decoder layers found \(4\) proves 4"),
    "num_query_groups": (4, r"num_query_groups 4 .*make 96 rows, but .*linear_qkv.weight is \(64, 32\)"),
    "normalization": ("LayerNorm", r"normalization: .*says LayerNorm, .* proves RMSNorm"),
    "swiglu": (False, r"gated: .*says false, .* proves true"),
    "multi_latent_attention": (True, r"the model belongs to no known family"),
}


@pytest.mark.parametrize("argument", ARGUMENT_FAULTS)
def test_saved_arguments_against_shapes(
    argument: str, checkpoint: Path, tmp_path: Path, earlier_export: Path
) -> None:
    value, message = ARGUMENT_FAULTS[argument]
    change_args(checkpoint, **{argument: value})
    refused(checkpoint, tmp_path, earlier_export, message)


def test_no_arguments_at_all(checkpoint: Path, tmp_path: Path, earlier_export: Path) -> None:
    (checkpoint / "common.pt").unlink()
    refused(checkpoint, tmp_path, earlier_export, "holds no training arguments .*give each with --set field=value")


# --- options ------------------------------------------------------------------------------------------------------

OPTION_FAULTS = {
    "tp and heads": (("--tp", 3), r"4 attention heads do not divide by tp 3"),
    "tp and ffn": (("--tp", 32), r"ffn size 48 does not divide by tp 32"),
    "pp and layers": (("--pp", 3), r"4 layers do not divide by pp 3: .*--trtllm-version 1.0 or later"),
    "pp beyond layers": (("--pp", 5), r"pp 5 is more than the model's 4 layers"),
    "release without builder": (("--trtllm-version", "1.3"), r"--trtllm-version 1.3: not a .*known: 0.12.*1.2"),
    "no release": (("--trtllm-version", "latest"), r"--trtllm-version latest: not a TensorRT-LLM release"),
    "unknown field": (("--set", "hidden=32"), r"no model configuration field 'hidden'; did you mean hidden_size\?"),
    "no field": (("--set", "hidden_size"), r"--set hidden_size: expected FIELD=VALUE"),
    "not a number": (("--set", "hidden_size=big"), r"hidden_size.*big"),
    "contradiction": (
        ("--set", "hidden_size=64"),
        r"hidden_size: command line says 64, .* proves 32; correct or drop the override",
    ),
    "vocabulary": (("--vocab-size", 65), r"vocab_size 65 is above padded_vocab_size 64"),
    "unknown family": (("--family", "bert"), r"--family bert: unknown; known: .*nemotron, .*llama, .*gpt"),
    "wrong family": (("--family", "gpt"), r"not gpt: normalization is RMSNorm, not LayerNorm"),
    "no config file": (("--config", "/nowhere.yaml"), r"/nowhere.yaml"),
}


@pytest.mark.parametrize("fault", OPTION_FAULTS)
def test_options(fault: str, whole_checkpoint: Path, tmp_path: Path, earlier_export: Path) -> None:
    options, message = OPTION_FAULTS[fault]
    refused(whole_checkpoint, tmp_path, earlier_export, message, *options)


def test_all_faults_come_in_one_message(whole_checkpoint: Path, tmp_path: Path, earlier_export: Path) -> None:
    message = r"2 faults\n  - 4 attention heads do not divide by tp 32\n  - ffn size 48 does not divide by tp 32"
    refused(whole_checkpoint, tmp_path, earlier_export, message, "--tp", 32)


def test_values_that_do_not_fit_float16(tmp_path: Path, earlier_export: Path) -> None:
    tensors = dict(MODEL.tensors)
    name = "decoder.layers.mlp.linear_fc2.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][2, 3, 4] = 65536.0
    checkpoint = write_torch_dist(tmp_path / "large", tensors, args=MODEL.args)
    message = r"2.mlp.proj.weight: 1 values do not fit float16 \(largest here 65536\).*--dtype bfloat16 or float32"
    refused(checkpoint, tmp_path, earlier_export, message, "--dtype", "float16")


# --- pickles that call something ----------------------------------------------------------------------------------


class Evil:
    """Unpickled without care, it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.canary}",)


def _evil_metadata(folder: Path, evil: Evil) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(evil))


def _evil_inside_metadata(folder: Path, evil: Evil) -> None:
    metadata = read_metadata(folder)
    metadata.planner_data = {"plan": evil}
    write_metadata(folder, metadata)


def _evil_common_file(folder: Path, evil: Evil) -> None:
    torch.save({"args": evil, "iteration": 10}, folder / "common.pt")


def _evil_common_record(folder: Path, evil: Evil) -> None:
    shutil.rmtree(folder)
    write_torch_dist(folder, MODEL.tensors, args={**MODEL.args, "extra": evil}, common="record")


def _evil_tensor_record(folder: Path, evil: Evil) -> None:
    metadata = read_metadata(folder)
    index = next(index for index in metadata.storage_data if index.fqn == QKV)
    info = metadata.storage_data[index]
    path = folder / "__9_0.distcp"
    torch.save([torch.zeros(info.length, dtype=torch.uint8), evil], path)
    info.relative_path, info.offset, info.length = path.name, 0, path.stat().st_size
    write_metadata(folder, metadata)


EVIL = {
    ".metadata": (_evil_metadata, r"\.metadata: refused: it names posix.system"),
    "inside .metadata": (_evil_inside_metadata, r"\.metadata: refused: it names posix.system"),
    "common.pt": (_evil_common_file, r"common.pt: .*posix.system"),
    "common_state record": (_evil_common_record, r"\.distcp: .*posix.system"),
    "data.pkl of a record": (_evil_tensor_record, r"__9_0.distcp: .*(posix.system|expected one plain tensor)"),
}


@pytest.mark.parametrize("place", EVIL)
def test_nothing_that_a_pickle_names_is_called(
    place: str, checkpoint: Path, tmp_path: Path, earlier_export: Path
) -> None:
    canary = tmp_path / "canary"
    plant, message = EVIL[place]
    plant(checkpoint, Evil(canary))
    refused(checkpoint, tmp_path, earlier_export, message)
    assert run_command("inspect", checkpoint).returncode in (0, 2)
    assert not canary.exists()


def test_the_canary_would_sing(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def test_a_configuration_file_runs_no_code(whole_checkpoint: Path, tmp_path: Path, earlier_export: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(f"hidden_size: !!python/object/apply:os.system ['touch {tmp_path}/canary']\n")
    refused(whole_checkpoint, tmp_path, earlier_export, r"model.yaml", "--config", file)
    assert not (tmp_path / "canary").exists()


# --- the output ---------------------------------------------------------------------------------------------------


def test_full_disk(whole_checkpoint: Path, mounted: Callable[..., Path], earlier_export: Path) -> None:
    disk = mounted("size=116k")  # the earlier export fits, a second one beside it does not
    message = r"rank0.safetensors: cannot write: the disk is full; free space or choose another output"
    check_refusal(run_command("export", whole_checkpoint, disk / "out", "--dtype", "float32"), message)
    assert contents(disk) == {}
    shutil.copytree(earlier_export, disk / "out")
    before = contents(disk)
    for num_processes in (1, 2):
        options = ("--overwrite", "--tp", 2, "--num-processes", num_processes)
        check_refusal(run_command("export", whole_checkpoint, disk / "out", *options), "the disk is full")
        assert contents(disk) == before


def test_file_size_limit(whole_checkpoint: Path, tmp_path: Path) -> None:
    """A limit of the system on file sizes is another way in which a write can fail."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    (tmp_path / "new").mkdir()
    command = [sys.executable, "-m", "dist_export", "export", str(whole_checkpoint), str(tmp_path / "new" / "out")]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, preexec_fn=limit)
    check_refusal(process, r"rank0.safetensors: cannot write: File too large")
    assert contents(tmp_path / "new") == {}


def test_read_only_parent(whole_checkpoint: Path, mounted: Callable[..., Path]) -> None:
    disk = mounted("size=1m,ro")
    process = run_command("export", whole_checkpoint, disk / "out")
    check_refusal(process, r"out: no permission to write in .*mount0")


def test_missing_parent(whole_checkpoint: Path, tmp_path: Path) -> None:
    process = run_command("export", whole_checkpoint, tmp_path / "a" / "b")
    check_refusal(process, r"the folder .*/a does not exist; create it first")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_what_is_no_export_is_never_replaced(
    overwrite: tuple[str, ...], whole_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    before = contents(tmp_path)
    expected = {
        "file": r"file: exists and is not a folder; choose another output",
        "folder": r"folder: holds files that are not an export; choose another output",
        "link": r"link: exists and is not a folder; choose another output",
    }
    for name, message in expected.items():
        check_refusal(run_command("export", whole_checkpoint, tmp_path / name, *overwrite), message)
    assert contents(tmp_path) == before


def test_an_export_is_replaced_only_when_asked(whole_checkpoint: Path, tmp_path: Path) -> None:
    output = export(whole_checkpoint, tmp_path / "out", "--tp", 2)
    before = contents(tmp_path)
    process = run_command("export", whole_checkpoint, output)
    check_refusal(process, "an export is there already; --overwrite replaces it")
    assert contents(tmp_path) == before
    export(whole_checkpoint, output, "--overwrite")
    assert set(contents(tmp_path)) == {
        "out", "out/config.json", "out/export_manifest.json", "out/export_report.html", "out/rank0.safetensors"
    }  # fmt: skip


def test_an_empty_folder_is_as_good_as_none(whole_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (export(whole_checkpoint, tmp_path / "out") / "config.json").exists()


# --- under a launcher ---------------------------------------------------------------------------------------------

NOTE_CODE = """
import os, runpy, sys
try:
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
except SystemExit as end:
    with open(os.path.join(os.environ["CODES"], os.environ["RANK"]), "w") as file:
        file.write(str(end.code))
    raise
"""


def run_torchrun(tmp_path: Path, *arguments: object) -> tuple[subprocess.CompletedProcess[str], list[int]]:
    """``torchrun --nproc-per-node 2 launch/export.py …``: the finished launcher and the exit code of each rank."""
    (tmp_path / "codes").mkdir()
    (tmp_path / "note_code.py").write_text(NOTE_CODE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [str(tmp_path / "note_code.py"), str(REPOSITORY / "launch" / "export.py")]
    command = [*launcher, *program, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CODES": str(tmp_path / "codes")}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return process, [int(path.read_text()) for path in sorted((tmp_path / "codes").iterdir())]


def _late_fault(folder: Path) -> None:
    """Only the process that reads the second half of the layers meets it."""
    place = [info for index, info in read_metadata(folder).storage_data.items() if index.fqn == QKV][-1]
    with (folder / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\xff" * 64)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("__1_0.distcp"), r"dist-export: error: rank \d: .*cannot be read: __1_0.distcp: No such file"),
        (_late_fault, r"dist-export: error: rank 1: .*__1_0.distcp: is not a zip as torch.save writes it"),
    ],
    ids=["every rank", "rank 1"],
)
def test_under_torchrun_every_rank_fails(
    damage: Fault, message: str, checkpoint: Path, tmp_path: Path, earlier_export: Path
) -> None:
    damage(checkpoint)
    shutil.copytree(earlier_export, tmp_path / "exports" / "out")
    before = contents(tmp_path / "exports")
    output = tmp_path / "exports" / "out"
    process, codes = run_torchrun(tmp_path, checkpoint, output, "--pp", 2, "--overwrite")
    assert process.returncode != 0
    assert len(codes) == 2, process.stderr
    assert 0 not in codes, process.stderr
    causes = [line for line in process.stderr.splitlines() if line.startswith("dist-export: ")]
    assert len(causes) == 1, process.stderr
    assert re.search(message, causes[0])
    assert "/dist_export/" not in process.stderr  # a traceback of ours; torchrun prints one of its own
    assert contents(tmp_path / "exports") == before
