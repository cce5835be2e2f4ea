"""What a parsing process hands over: stand-ins as they were, and nothing that could run."""

from __future__ import annotations

import argparse
import pickle
import signal
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from support.hostile_pickles import HOSTILE, saved_pickle  # noqa: E402

from dist_export.checkpoint.hand_over import pack, unpack  # noqa: E402
from dist_export.checkpoint.pickles import Record, load_state_pickle  # noqa: E402
from dist_export.errors import ExportError  # noqa: E402


def test_states_arrive_as_they_were() -> None:
    arguments = argparse.Namespace(a=[1, 2.5, None], dtype=torch.bfloat16, end=signal.SIGTERM, path=Path("a"), s={1})
    tensors = {"w": torch.nn.Parameter(torch.ones(2, 3).t()), "fp8": torch.zeros(4, dtype=torch.float8_e4m3fn)}
    state = load_state_pickle(saved_pickle({"args": arguments, "model": tensors}), origin="s")
    there = unpack(pack(state, origin="s"), origin="s")
    assert there["model"] == state["model"]
    assert there["args"].kind == "argparse.Namespace"
    for name in ("a", "dtype"):
        assert there["args"].get(name) == state["args"].get(name)
    for name in ("end", "path", "s"):
        before, after = state["args"].get(name), there["args"].get(name)
        assert (after.kind, after.args) == (before.kind, before.args)
    assert isinstance(there["args"], Record)


def test_shared_and_cyclic_values_stay_so() -> None:
    inner = {"k": [1]}
    cyclic = argparse.Namespace(first=inner, second=inner)
    cyclic.itself = cyclic
    there = unpack(pack(load_state_pickle(pickle.dumps([cyclic]), origin="s"), origin="s"), origin="s")[0]
    assert there.get("first") is there.get("second")
    assert there.get("itself") is there


def test_values_that_are_nested_too_deeply() -> None:
    value: list[object] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ExportError, match="s: its values are nested too deeply"):
        pack(value, origin="s")


@pytest.mark.parametrize("name", ["os.system in protocol 4", "eval in protocol 2", "builtins getattr", "STACK_GLOBAL"])
def test_nothing_else_is_taken(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match=r"s: the process that parses it left something unreadable: .* no stand-in"):
        unpack(HOSTILE[name], origin="s")
    with pytest.raises(ExportError, match=r"s: .*unreadable"):
        unpack(b"\x80\x05]", origin="s")
    assert list(tmp_path.iterdir()) == []
