"""Enum members as Python 3.11.2 pickles them, by `getattr` and by global name, whatever Python runs the tests."""

from __future__ import annotations

import argparse
import enum
import io
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import metadata as dcp

from dist_export.checkpoint.pickles import Record, load_metadata_pickle, load_state_pickle
from dist_export.errors import ExportError

CHECKPOINTS = Path(__file__).parents[1] / "conformance" / "checkpoints"
METADATA = sorted(CHECKPOINTS.glob("*/iter_*/.metadata"))
PROTOCOLS = range(6)


class ByName(pickle.Pickler):
    """Pickles enum members as Enum.__reduce_ex__ and enum._reduce_ex_by_global_name of Python 3.11.2 have it."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, signal.Signals):
            return value.name
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def pickled(value: object, protocol: int) -> bytes:
    buffer = io.BytesIO()
    ByName(buffer, protocol).dump(value)
    return buffer.getvalue()


class Getattr:
    """Pickled as a call of `getattr` with any arguments."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.args


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_members_become_records_of_their_class(protocol: int) -> None:
    value = argparse.Namespace(layout=dcp._MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT, exit_signal=signal.SIGTERM)
    data = pickled(value, protocol)
    assert b"getattr" in data
    read = load_state_pickle(data, origin="s")
    layout, exit_signal = read.get("layout"), read.get("exit_signal")
    assert isinstance(layout, Record)
    assert layout.kind == "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING"
    assert layout.kwargs == {"name": "TORCH_PRESERVE_FORMAT"}
    assert (exit_signal.kind, exit_signal.args) == ("signal.Signals", (int(signal.SIGTERM),))


@pytest.mark.parametrize("path", METADATA, ids=lambda path: path.parts[-3])
def test_metadata_with_such_members_reads_the_same(path: Path) -> None:
    data = path.read_bytes()
    rewritten = pickled(pickle.loads(data), 4)
    assert b"getattr" in rewritten
    expected, actual = load_metadata_pickle(data, origin="m"), load_metadata_pickle(rewritten, origin="m")
    assert list(actual.state_dict_metadata) == list(expected.state_dict_metadata)
    assert [(i.relative_path, i.offset, i.length) for i in actual.storage_data.values()] == [
        (i.relative_path, i.offset, i.length) for i in expected.storage_data.values()
    ]


@pytest.mark.parametrize("value", [Getattr({}, "keys"), Getattr("text", "format"), Getattr(1, "real"), Getattr()])
@pytest.mark.parametrize("load", [load_state_pickle, load_metadata_pickle])
def test_getattr_of_anything_else_is_refused(load: Any, value: Getattr) -> None:
    with pytest.raises(ExportError, match=r"x: not a pickle.*: refused: it names builtins\.getattr"):
        load(pickle.dumps(value), origin="x")


def test_other_names_of_the_signal_module_are_refused() -> None:
    with pytest.raises(ExportError, match=r"s: refused: it names _?signal\.alarm, which no checkpoint needs"):
        load_state_pickle(pickle.dumps(signal.alarm), origin="s")
