"""What the README calls whole examples of a family, a format and a target export and verify."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from examples import crate, tiny  # noqa: E402
from support.exports import export, raw_bytes, run_command, tensors_of  # noqa: E402
from support.small_models import LLAMA, small_model  # noqa: E402
from support.torch_dist import write_torch_dist  # noqa: E402

from dist_export import arguments  # noqa: E402
from dist_export.checkpoint import open as opening  # noqa: E402
from dist_export.checkpoint.formats import Format  # noqa: E402
from dist_export.cli import main  # noqa: E402
from dist_export.targets import registry  # noqa: E402

HERE = Path(__file__).parent
ALONE = ("--num-processes", "1")


def test_a_family(tmp_path: Path) -> None:
    """transformers finds every tensor that it looks for, and nothing else."""
    model = small_model(LLAMA, swiglu=False, squared_relu=True)
    checkpoint = write_torch_dist(tmp_path / "iter_0000001", model.tensors, args=model.args)
    code = "--allow-mapping-code"
    output = export(checkpoint, tmp_path / "out", "--target", "hf", "--mapping", HERE / "petrel.py", code, *ALONE)
    assert run_command("verify", checkpoint, output, code, *ALONE).returncode == 0
    refused = run_command("plan", checkpoint, "--mapping", HERE / "petrel.py", code)
    assert refused.returncode == 2 and "it has no such class" in refused.stderr
    transformers = pytest.importorskip("transformers")
    _, found = transformers.AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(found.values()), found


def test_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder, data, tensors = small_model(LLAMA), tmp_path / "crate", b"", {}
    for name, tensor in model.per_layer().items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        tensors[name] = {"shape": list(tensor.shape), "dtype": dtype, "offset": len(data)}
        data += raw_bytes(tensor)
    folder.mkdir()
    (folder / "crate.json").write_text(json.dumps({"args": model.args, "iteration": 3, "tensors": tensors}))
    (folder / "data.bin").write_bytes(data)
    line = Format(crate.FORMAT, crate.is_crate, crate.read_index, crate.read_common_state)
    monkeypatch.setattr(opening, "FORMATS", (line, *opening.FORMATS))
    assert main(["export", str(folder), str(tmp_path / "out"), *ALONE]) == 0
    assert main(["verify", str(folder), str(tmp_path / "out"), *ALONE]) == 0
    same = write_torch_dist(tmp_path / "iter_0000003", model.tensors, args=model.args)
    expected = export(same, tmp_path / "expected", *ALONE)
    assert (tmp_path / "out" / "rank0.safetensors").read_bytes() == (expected / "rank0.safetensors").read_bytes()
    (folder / "data.bin").write_bytes(data[:-10])
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 2
    assert "files are shorter than the checkpoint's metadata says: data.bin" in capsys.readouterr().err


MAPPING = """
from msgspec.structs import replace
from dist_export.families.llama import LLAMA
from examples.tiny import TINY, TinyModel

def make_family(config):
    return replace(LLAMA, architectures={**LLAMA.architectures, "tiny": (TinyModel("llama", TINY),)})
"""


def test_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = registry.Target(
        name=tiny.NAME, title="Tiny", runtimes="Tiny", options=tiny.TinyOptions, plan_export=tiny.plan_export
    )
    monkeypatch.setattr(registry, "TARGETS", (*registry.TARGETS, target))
    monkeypatch.setattr(arguments, "targets_of", lambda options: [tiny.TinyOptions(dtype=options.dtype)])
    (tmp_path / "family.py").write_text(MAPPING)
    model = small_model(LLAMA)
    checkpoint = write_torch_dist(tmp_path / "iter_0000001", model.tensors, args=model.args)
    given = ("--mapping", str(tmp_path / "family.py"), "--allow-mapping-code", *ALONE)
    assert main(["export", str(checkpoint), str(tmp_path / "out"), *given]) == 0
    assert main(["verify", str(checkpoint), str(tmp_path / "out"), given[2], *ALONE]) == 0
    written = tensors_of(tmp_path / "out" / "weights.safetensors")
    assert torch.equal(written["blk.1.attn_qkv"], torch.cat(model.qkv(1)))
    page = (tmp_path / "out" / "export_report.html").read_text()
    assert "llama for Tiny" in page and f"tiny-serve {tmp_path / 'out'}" in page
