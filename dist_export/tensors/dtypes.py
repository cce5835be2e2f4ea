"""Element types: one name, one size, one spelling per file format. Pure data, no torch."""

from __future__ import annotations

from msgspec import Struct

from dist_export.errors import ExportError


class DType(Struct, frozen=True):
    """An element type."""

    name: str
    """As torch prints it without ``torch.``: ``bfloat16``."""
    itemsize: int  # bytes
    safetensors: str
    """The code in a safetensors header (safetensors/tensor.rs, ``Dtype``)."""

    def __str__(self) -> str:
        return self.name


FLOAT64 = DType("float64", 8, "F64")
FLOAT32 = DType("float32", 4, "F32")
FLOAT16 = DType("float16", 2, "F16")
BFLOAT16 = DType("bfloat16", 2, "BF16")
FLOAT8_E4M3 = DType("float8_e4m3fn", 1, "F8_E4M3")
FLOAT8_E5M2 = DType("float8_e5m2", 1, "F8_E5M2")
INT64 = DType("int64", 8, "I64")
INT32 = DType("int32", 4, "I32")
INT16 = DType("int16", 2, "I16")
INT8 = DType("int8", 1, "I8")
UINT8 = DType("uint8", 1, "U8")
BOOL = DType("bool", 1, "BOOL")

_ALL = (FLOAT64, FLOAT32, FLOAT16, BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2, INT64, INT32, INT16, INT8, UINT8, BOOL)
_BY_NAME = {dtype.name: dtype for dtype in _ALL}
_BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in _ALL}


def dtype_by_name(name: str, *, where: str = "") -> DType:
    """The element type torch calls `name`; `ExportError` (saying `where`) when we do not know it."""
    if name not in _BY_NAME:
        raise ExportError(f"{where or 'a tensor'}: unknown element type {name!r}; known: {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def dtype_by_safetensors_code(code: str, *, where: str = "") -> DType:
    """The element type of a safetensors header's `code`; `ExportError` (saying `where`) when unknown."""
    if code not in _BY_SAFETENSORS:
        raise ExportError(f"{where or 'a safetensors header'}: unknown element type code {code!r}")
    return _BY_SAFETENSORS[code]
