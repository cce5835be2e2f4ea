"""Two iterations of a model in one --save folder, exports of them, and what makes two exports equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_export.cli import main
from support.small_models import LLAMA, SmallModel, small_model
from support.torch_dist import Chunks, write_torch_dist

OLD, NEW = 10, 20
REDO = ".refit.dist_export"
OPTIONS = ("--target", "trtllm", "--target", "hf", "--tp", 2)
"""Of `exports_of_both`."""
Edit = Callable[[dict[str, torch.Tensor]], object]


def save_both(folder: Path, model: SmallModel, edit: Edit, *, chunks: Chunks | None = None, **objects: Any) -> Path:
    """A --save folder with `model` as iteration 10 and, changed by `edit`, as iteration 20."""
    changed = {name: tensor.clone() for name, tensor in model.tensors.items()}
    edit(changed)
    for iteration, tensors in ((OLD, model.tensors), (NEW, changed)):
        written = write_torch_dist(folder / f"iter_{iteration:07d}", tensors, args=model.args, chunks=chunks, **objects)
        set_iteration(written, iteration)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(NEW))
    return folder


def exports_of_both(folder: Path, *, padded_vocab_size: int) -> dict[str, Path]:
    """A --save folder ("save") and an export of each of its iterations ("old", "new"), which differ everywhere."""
    model = small_model(LLAMA, hidden_size=64, ffn_hidden_size=192, padded_vocab_size=padded_vocab_size)
    save = save_both(folder / "save", model, lambda tensors: [tensor.mul_(1.5) for tensor in tensors.values()])
    old, new = (export(save, folder / str(iteration), iteration, *OPTIONS) for iteration in (OLD, NEW))
    return {"save": save, "old": old, "new": new}


def set_iteration(folder: Path, iteration: int) -> None:
    """Say in an iteration folder that it is of that iteration."""
    state = torch.load(folder / "common.pt", weights_only=False)
    state["iteration"] = iteration
    torch.save(state, folder / "common.pt")


def run(*arguments: object) -> int:
    """``dist-export …`` in this process; returns its exit code."""
    return main([*map(str, arguments), "--num-processes", "1"])


def export(save: Path, output: Path, iteration: int, *options: object) -> Path:
    """Export an iteration; the test fails when that fails."""
    given = ("--iteration", iteration) if (save / "latest_checkpointed_iteration.txt").exists() else ()
    assert run("export", save, output, *given, *options) == 0
    return output


def assert_same_export(one: Path, other: Path) -> None:
    """Every file byte for byte, but for what tells of the run. Fails with the name of the file."""
    assert names(one) == names(other)
    for name in names(one):
        if name.endswith("export_report.html"):
            continue
        if name.endswith("export_manifest.json"):
            assert _told(one / name) == _told(other / name)
        else:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def names(folder: Path) -> list[str]:
    """All files below a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {name: (folder / name).read_bytes() for name in names(folder)}


def _told(manifest: Path) -> dict[str, Any]:
    found = json.loads(manifest.read_text())
    return {name: value for name, value in found.items() if name not in ("run", "refit")}
