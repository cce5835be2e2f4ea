"""A checkpoint large enough to be stopped within, what an undisturbed export makes of it, and faulty programs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faulty_runs import PROGRAM
from support.launched import LAYOUT


@pytest.fixture(scope="session")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 13 MB of float32, 200 tiles of 64 KiB."""
    torch = pytest.importorskip("torch")
    from support.small_models import LLAMA, small_model
    from support.torch_dist import write_torch_dist

    sizes = {"hidden_size": 256, "ffn_hidden_size": 768, "num_attention_heads": 8, "kv_channels": 32}
    model = small_model(LLAMA, num_layers=2, padded_vocab_size=3072, dtype=torch.float32, **sizes)
    folder = tmp_path_factory.mktemp("long") / "iter_0000010"
    return write_torch_dist(folder, model.tensors, args=model.args)


@pytest.fixture(scope="session")
def whole(long_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `dist-export export` makes of it, without a launcher."""
    from support.exports import export

    return export(long_checkpoint, tmp_path_factory.mktemp("whole") / "out", *LAYOUT, "--num-processes", 1)


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., str]:
    """`program(pace=0.1)` is launch/export.py with this fault (see tests/faults/faulty_export.py), as a program of
    its own. In a requeued job it has none."""

    def write(**fault: object) -> str:
        path = tmp_path / "faulty.py"
        path.write_text(
            "import os, runpy, sys\n"
            f"fault = {json.dumps(fault)!r} if os.environ.get('SLURM_RESTART_COUNT', '0') == '0' else '{{}}'\n"
            f"sys.argv = [{str(PROGRAM)!r}, 'launched', fault, *sys.argv[1:]]\n"
            f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')\n"
        )
        return str(path)

    return write


@pytest.fixture(autouse=True)
def fresh_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers see no variables of whatever launcher the tests themselves run under."""
    prefixes = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_", "TORCHELASTIC", "SLURM_", "OMPI_", "PMI")
    for name in [name for name in os.environ if name.startswith(prefixes)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
