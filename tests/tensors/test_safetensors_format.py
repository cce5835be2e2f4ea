import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dist_export.errors import ExportError
from dist_export.tensors.dtypes import FLOAT32, INT8
from dist_export.tensors.safetensors_format import DATA_ALIGNMENT, build_header, read_header


def test_the_reference_library_reads_our_header(tmp_path):
    header = build_header([("a", FLOAT32, (2, 3), 0), ("é", INT8, (), 24)], metadata={"format": "pt"})
    assert len(header) % DATA_ALIGNMENT == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + np.arange(6, dtype="f4").tobytes() + b"\x07")
    loaded = load_file(path)
    assert (loaded["a"] == np.arange(6, dtype="f4").reshape(2, 3)).all()
    assert loaded["é"] == 7


def test_we_read_the_reference_librarys_header(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(6, dtype="f4"), "b": np.zeros((2, 0), "i1")}, path)
    tensors = read_header(path)
    stored = tensors["a"]
    assert (stored.dtype, stored.shape, stored.num_bytes) == (FLOAT32, (6,), 24)
    assert path.read_bytes()[stored.offset : stored.offset + 24] == np.arange(6, dtype="f4").tobytes()
    assert tensors["b"].num_bytes == 0


@pytest.mark.parametrize("cut, message", [(4, "not a safetensors file"), (40, "inside its header"), (-1, "cut off")])
def test_a_cut_file_is_refused_by_name(tmp_path, cut, message):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(6, dtype="f4")}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ExportError, match=f"x.safetensors: .*{message}"):
        read_header(path)
