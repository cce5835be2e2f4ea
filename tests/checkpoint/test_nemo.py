"""NeMo 1 archives and their folders against the same model in Megatron-LM's torch_dist, and hostile archives."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from support.every_format import nemo_folder, nemo_rank_folder
from support.exports import run_command
from support.other_formats import add_member, exported, pack, write_nemo_folder, write_zarr
from support.small_models import GPT, LLAMA, NEMOTRON, small_model
from support.torch_dist import write_torch_dist

from dist_export import api
from dist_export.checkpoint.archive import open_tar
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.checkpoint.nemo import config_arguments
from dist_export.checkpoint.open import checkpoint_of, open_checkpoint
from dist_export.errors import ExportError
from dist_export.models.config import RopeScaling

torch = pytest.importorskip("torch")
STYLES = {"llama": LLAMA, "gpt": GPT, "nemotron": NEMOTRON}


def model_of(checkpoint: Path) -> Any:
    return api.open_model(api.Source(checkpoint=checkpoint)).resolved.config


@pytest.mark.parametrize("name", STYLES)
def test_torch_dist_inside(tmp_path: Path, name: str) -> None:
    model = small_model(STYLES[name])
    plain = exported(write_torch_dist(tmp_path / "plain", model.tensors, args=model.args), tmp_path / "a", "--tp", 2)
    folder = nemo_folder(tmp_path / "extracted", model)
    assert exported(pack(folder, tmp_path / "m.nemo"), tmp_path / "b", "--tp", 2) == plain
    assert exported(folder, tmp_path / "c", "--tp", 2) == plain


def test_compressed(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    plain = exported(write_torch_dist(tmp_path / "plain", model.tensors, args=model.args), tmp_path / "a", "--tp", 2)
    archive = pack(nemo_folder(tmp_path / "extracted", model), tmp_path / "m.nemo", mode="w:gz")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    code = "import sys; from dist_export.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "export", archive, tmp_path / "b", "--tp", "2"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, "TMPDIR": str(temporary)}, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    verified = run_command("verify", archive, tmp_path / "b", "--num-processes", 2, env={"TMPDIR": str(temporary)})
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").glob("*.safetensors")}.items() <= plain.items()
    assert list(temporary.iterdir()) == []
    manifest = json.loads((tmp_path / "b" / "export_manifest.json").read_text())
    assert manifest["source"]["folder"] == str(archive)
    assert any("the tokenizer (sentencepiece, 0123_tokenizer.model), which" in note for note in manifest["notes"])
    assert str(archive) in run_command("inspect", archive).stdout


def test_errors_about_a_compressed_archive_name_it(tmp_path: Path) -> None:
    folder = nemo_folder(tmp_path / "extracted", small_model(LLAMA))
    (folder / "model_weights" / ".metadata").write_bytes(b"x")
    archive = pack(folder, tmp_path / "m.nemo", mode="w:gz")
    with pytest.raises(ExportError, match=f"^{archive}: model_weights/.metadata: not a pickle"):
        open_checkpoint(archive)
    write_torch_dist(folder / "model_weights", small_model(LLAMA).tensors, args=None)
    (folder / "model_config.yaml").write_text("- 1")
    with pytest.raises(ExportError, match=f"^{archive}: model_config.yaml"):
        open_checkpoint(pack(folder, archive, mode="w:gz"))


@pytest.mark.parametrize("packed", [True, False])
def test_zarr_inside(tmp_path: Path, packed: bool) -> None:
    model = small_model(LLAMA)
    plain = exported(write_torch_dist(tmp_path / "plain", model.tensors, args=model.args), tmp_path / "a")
    folder = write_nemo_folder(tmp_path / "extracted", model)
    write_zarr(folder / "model_weights", model.tensors, args=None, parts=3, prefix="model.")
    assert exported(pack(folder, tmp_path / "m.nemo") if packed else folder, tmp_path / "b") == plain


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_state_dicts_per_rank(tmp_path: Path, tp: int, pp: int) -> None:
    model = small_model(LLAMA)
    plain = exported(write_torch_dist(tmp_path / "plain", model.tensors, args=model.args), tmp_path / "a")
    folder = nemo_rank_folder(tmp_path / "extracted", model, tp=tp, pp=pp)
    archive = pack(folder, tmp_path / "m.nemo")
    assert open_checkpoint(archive).index.format == "NeMo 1 (legacy)"
    assert exported(archive, tmp_path / "b") == plain
    assert exported(folder, tmp_path / "c") == plain


def test_offsets_are_those_of_the_archive(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    archive = pack(nemo_folder(tmp_path / "extracted", model), tmp_path / "m.nemo")
    checkpoint = open_checkpoint(archive)
    index = checkpoint.index
    assert (index.format, index.folder, index.path(0), len(index.files)) == ("NeMo 1 (torch_dist)", archive, archive, 1)
    with archive.open("rb") as file:
        for chunk in index.chunks("decoder.final_layernorm.weight"):
            assert os.pread(file.fileno(), 4, chunk.offset) == b"PK\x03\x04"
    assert checkpoint.arguments is not None and checkpoint.arguments["activation_func"] == "silu"


def test_what_inspect_says(archive: Path) -> None:
    said = run_command("inspect", archive).stdout
    assert "NeMo 1 (torch_dist)" in said
    assert "tokenizer files (0123456789abcdef0123456789abcdef_tokenizer.model)" in said


def test_configuration(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    changes = {"ffn_hidden_size": "${.sizes.ffn}", "sizes": {"ffn": "${mlp}"}, "mlp": 48, "kv_channels": None}
    changes |= {"scale_positional_embedding": True, "layernorm_epsilon": "1e-5", "num_query_groups": "${num_layers}"}
    config = model_of(nemo_folder(tmp_path / "a", model, **changes))
    assert config.rope_scaling == RopeScaling("llama3", 8.0)
    assert (config.ffn_hidden_size, config.norm_epsilon, config.head_size, config.num_query_groups) == (48, 1e-5, 8, 2)
    assert model_of(nemo_folder(tmp_path / "b", model, mcore_customization_config={"qk_layernorm": False})).gated
    fused = small_model(GPT)
    assert model_of(nemo_folder(tmp_path / "c", fused, bias_activation_fusion=None)).activation == "gelu_tanh"
    assert model_of(nemo_folder(tmp_path / "d", fused, openai_gelu=True)).activation == "gelu_tanh"


def test_what_a_configuration_leaves_out() -> None:
    """megatron_base_model.py and megatron_gpt_model.py: what `cfg.get` gives. Customisation comes last."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "encoder_seq_length": 128}
    found = config_arguments(sizes, origin="a")
    expected = {
        "add_bias_linear": True,
        "layernorm_epsilon": 1e-5,
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "position_embedding_type": "learned_absolute",
        "untie_embeddings_and_output_weights": False,
        "activation_func": "gelu",
        "gated_linear_unit": False,
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": False,
        "kv_channels": 16,
        "max_position_embeddings": 128,
    }
    assert {name: found[name] for name in expected} == expected
    custom = {"mcore_customization_config": {"rotary_base": 5e5}, "rotary_base": 10000}
    assert config_arguments({**sizes, **custom}, origin="a")["rotary_base"] == 5e5
    assert config_arguments({**sizes, "normalization": "layernorm1p"}, origin="a")["layernorm_zero_centered_gamma"]
    learned = {**sizes, "max_position_embeddings": 512}
    assert config_arguments(learned, origin="a")["max_position_embeddings"] == 512
    assert config_arguments({**learned, "mcore_gpt": True}, origin="a")["max_position_embeddings"] == 128


def test_gemma_2(tmp_path: Path) -> None:
    """scripts/checkpoint_converters/convert_gemma2_hf_to_nemo.py, `adjust_nemo_config`."""
    custom = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 224}
    changes = {"apply_embedding_scaling": True, "layernorm_zero_centered_gamma": True, "window_size": [16, 0]}
    changes |= {"activation": "fast-geglu", "openai_gelu": True, "mcore_customization_config": custom}
    config = model_of(nemo_folder(tmp_path / "a", small_model(LLAMA), **changes))
    assert config.embedding_scaling and config.zero_centered_norm and config.activation == "gelu_tanh"
    assert (config.query_pre_attn_scalar, config.attn_logit_softcapping) == (224, 50)
    assert (config.final_logit_softcapping, config.window_size, config.window_layers) == (30, 16, (1, 0))


def test_falcon(tmp_path: Path) -> None:
    changes = {"parallel_attention": True, "new_decoder_architecture": False}
    config = model_of(nemo_folder(tmp_path / "a", small_model(LLAMA), mcore_customization_config=changes))
    assert config.parallel_attention and not config.separate_mlp_norm


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "${oc.env:HOME}"}, "hidden_size is '.{2}oc.env:HOME}', which does not name another key"),
        ({"hidden_size": "${multiply:4,8}"}, "does not name another key"),
        ({"hidden_size": "${hidden_size}"}, "does not name another key"),
        ({"hidden_size": "${a}", "a": "${b}", "b": "${a}"}, "does not name another key"),
        ({"hidden_size": "${tokenizer}"}, "does not name another key"),
        ({"activation": "mish"}, "activation is 'mish', expected one of gelu"),
        ({"normalization": "crmsnorm"}, "normalization is 'crmsnorm'"),
        ({"transformer_block_type": "post_ln"}, "only pre_ln blocks"),
        ({"hidden_size": "a lot"}, "expected an integer"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = nemo_folder(tmp_path / "a", small_model(LLAMA), **changes)
    with pytest.raises(ExportError, match=message):
        model_of(folder)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nemo")
    return pack(nemo_folder(folder / "extracted", small_model(LLAMA)), folder / "m.nemo")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("../outside", {}, "'../outside' leads out of the archive"),
        ("./a/../../b", {}, "leads out of the archive"),
        ("/etc/passwd", {}, "'/etc/passwd' leads out of the archive"),
        ("a" * 300 + "/../x", {}, "leads out of the archive"),
        ("link", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "link is a symbolic link"),
        ("link", {"type": tarfile.LNKTYPE, "linkname": "model_config.yaml"}, "link is a link"),
        ("null", {"type": tarfile.CHRTYPE}, "null is a device"),
        ("disk", {"type": tarfile.BLKTYPE}, "disk is a device"),
        ("pipe", {"type": tarfile.FIFOTYPE}, "pipe is a pipe"),
        ("holes", {"type": tarfile.GNUTYPE_SPARSE}, "holes is sparse"),
        ("odd", {"type": b"Z"}, "odd is of tar type b'Z'"),
        ("./model_config.yaml", {}, "model_config.yaml is there twice"),
    ],
)
def test_hostile_members(tmp_path: Path, archive: Path, name: str, fields: dict[str, Any], message: str) -> None:
    copy = tmp_path / "m.nemo"
    copy.write_bytes(archive.read_bytes())
    add_member(copy, name, **fields)
    with pytest.raises(ExportError, match=message):
        open_checkpoint(copy)


def test_long_names_and_large_members(tmp_path: Path) -> None:
    for number, style in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)):
        path, name = tmp_path / f"{number}.tar", "d" * 90 + "/" + "n" * 90
        with tarfile.open(path, "w:", format=style) as tar:
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
        assert open_tar(path).read(name, most=3) == b"abc"
    huge = tarfile.TarInfo("huge")
    huge.size = 1 << 40
    (tmp_path / "huge.tar").write_bytes(huge.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(ExportError, match=r"huge needs 1099511628288 bytes, the archive has 512: it is cut"):
        open_tar(tmp_path / "huge.tar")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (b"00000000000", r"no tar header at byte \d+: the archive is cut or damaged"),
        (b"77777777777", r"needs \d+ bytes, the archive has \d+: it is cut"),
        (b"many bytes!", r"a member whose size is b'many bytes!"),
        (b"-0000000001", r"a member whose size is b'-0000000001"),
        (b"1_000_000", r"a member whose size is b'1_000_000"),
        (b"\xff" * 11, r"a member of an impossible size"),
        (b"\x80" + b"\xff" * 10, r"a member of an impossible size"),
    ],
)
def test_sizes_that_lie(tmp_path: Path, archive: Path, size: bytes, message: str) -> None:
    data = bytearray(archive.read_bytes())
    start = data.index(b"./model_config.yaml")
    header = data[start : start + 512]
    header[124:136] = size.ljust(12, b"\xff" if size[0] > 127 else b"\0")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * ord(" "))
    copy = tmp_path / "m.nemo"
    copy.write_bytes(data[:start] + header + data[start + 512 :])
    with pytest.raises(ExportError, match=message) as caught:
        open_checkpoint(copy)
    assert str(copy) in str(caught.value)


def test_flipped_bytes_of_a_compressed_archive(tmp_path: Path, archive: Path) -> None:
    packed, random = gzip.compress(archive.read_bytes(), compresslevel=1), Random(0)
    copy = tmp_path / "m.nemo"
    for _ in range(30):
        position = random.randrange(len(packed))
        copy.write_bytes(packed[:position] + bytes([packed[position] ^ 0x10]) + packed[position + 1 :])
        with contextlib.suppress(ExportError):  # the time in the header means nothing
            open_checkpoint(copy)


def test_pax_headers_that_claim_much(tmp_path: Path) -> None:
    for kind in (b"x", b"L"):
        member = tarfile.TarInfo("header")
        member.type, member.size = kind, 1 << 33
        (tmp_path / "m.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT))
        with pytest.raises(ExportError, match=r"a header of 8589934592 bytes"):
            open_tar(tmp_path / "m.tar")
    for record in (b"99999999 path=a\n", b"12 path", b"22 size=9999999999999\n", b"26 GNU.sparse.size=1000\n"):
        header, member = tarfile.TarInfo("header"), tarfile.TarInfo("a")
        header.type, header.size = tarfile.XHDTYPE, len(record)
        (tmp_path / "p.tar").write_bytes(header.tobuf() + record.ljust(512, b"\0") + member.tobuf() + bytes(1024))
        with pytest.raises(ExportError, match=r"pax header that is malformed|not one that is accepted|it is cut"):
            open_tar(tmp_path / "p.tar")


def test_damage(tmp_path: Path, archive: Path) -> None:
    data = archive.read_bytes()
    copy = tmp_path / "m.nemo"
    copy.write_bytes(data[: len(data) // 2])
    with pytest.raises(ExportError, match=r"it is cut|cut or damaged|lacks|no weights"):
        open_checkpoint(copy)
    copy.write_bytes(b"PK" + data)
    with pytest.raises(ExportError, match=r"not a folder and not a \.nemo archive"):
        open_checkpoint(copy)
    for position in range(0, len(data), max(len(data) // 60, 1)):
        copy.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
        try:
            model_of(copy)
        except ExportError:
            continue


def test_compressed_archives_that_grow_or_are_cut(tmp_path: Path, archive: Path) -> None:
    copy = tmp_path / "m.nemo"
    member = tarfile.TarInfo("zeros")
    member.size = 64 << 20
    copy.write_bytes(gzip.compress(member.tobuf() + bytes(64 << 20)))
    with pytest.raises(ExportError, match=r"decompresses to more than .* 100 times its size"):
        open_checkpoint(copy)
    packed = gzip.compress(archive.read_bytes(), compresslevel=1)
    copy.write_bytes(packed[:-20])
    with pytest.raises(ExportError, match=r"cannot be decompressed: Compressed file ended"):
        open_checkpoint(copy)
    copy.write_bytes(packed[:-1] + bytes([packed[-1] ^ 1]))
    with pytest.raises(ExportError, match=r"cannot be decompressed: Incorrect length"):
        open_checkpoint(copy)


def test_archives_without_what_they_need(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    folder = write_nemo_folder(tmp_path / "a", model)
    with pytest.raises(ExportError, match=r"holds no weights"):
        open_checkpoint(pack(folder, tmp_path / "a.nemo"))
    write_torch_dist(folder / "model_weights", model.tensors, args=None)
    (folder / "model_weights" / "__0_0.distcp").unlink()
    with pytest.raises(ExportError, match=r"model_weights lacks __0_0.distcp"):
        open_checkpoint(pack(folder, tmp_path / "b.nemo"))
    (folder / "model_config.yaml").unlink()
    with pytest.raises(ExportError, match=r"an archive without model_config.yaml"):
        open_checkpoint(pack(folder, tmp_path / "c.nemo"))


def test_records_must_end_inside_their_member(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    folder = nemo_folder(tmp_path / "a", model)
    data = folder / "model_weights" / "__0_0.distcp"
    os.truncate(data, data.stat().st_size - 10)
    with pytest.raises(ExportError, match=r"__0_0\.distcp: has \d+ bytes, needs \d+; the file is truncated"):
        open_checkpoint(pack(folder, tmp_path / "a.nemo"))


def test_hostile_configuration(tmp_path: Path) -> None:
    folder = nemo_folder(tmp_path / "a", small_model(LLAMA))
    (folder / "model_config.yaml").write_text("a: !!python/name:os.system")
    with pytest.raises(ExportError, match=r"model_config.yaml: refused: it has the tag"):
        open_checkpoint(pack(folder, tmp_path / "a.nemo"))
    (folder / "model_config.yaml").write_text(yaml.safe_dump({"num_layers": [[1]]}))
    with pytest.raises(ExportError, match=r"num_layers is not set"):
        model_of(pack(folder, tmp_path / "b.nemo"))


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_processes_that_only_map_the_table(tmp_path: Path, mode: str) -> None:
    archive = pack(nemo_folder(tmp_path / "extracted", small_model(LLAMA)), tmp_path / "m.nemo", mode=mode)
    checkpoint = open_checkpoint(archive)
    again = checkpoint_of(CheckpointIndex.from_buffer(checkpoint.index.to_bytes()))
    assert again.arguments == checkpoint.arguments
    assert again.fingerprint() == checkpoint.fingerprint() == open_checkpoint(archive).fingerprint()
