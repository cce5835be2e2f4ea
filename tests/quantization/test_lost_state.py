"""A checkpoint that ModelOpt quantised, of which its own folder and every amax is missing."""

import shutil
from pathlib import Path

import torch
from support.exports import run_command
from support.quantizable import E4M3, llama
from support.quantizer_states import properties, te_state

MX = {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}


def test_states_of_layers_are_enough_to_know(tmp_path: Path) -> None:
    """Dynamic quantisers have no amax: nothing but the layers' own states tells of them then."""
    model = llama()
    for name in model.linears:
        model.modelopt(
            name,
            weight_quantizer=properties(E4M3, block_sizes=MX, buffers=()),
            input_quantizer=properties(E4M3, block_sizes=MX, buffers=()),
        )
    checkpoint = model.write(tmp_path / "c")
    for folder in checkpoint.rglob("modelopt_state"):
        shutil.rmtree(folder)
    process = run_command("export", checkpoint, tmp_path / "out")
    assert process.returncode == 2, process.stdout
    assert "quantisation that cannot be exported" in process.stderr and "linear_qkv: MXFP8" in process.stderr
    assert not (tmp_path / "out").exists()


def test_states_of_training_are_not_taken_for_it(tmp_path: Path) -> None:
    model = llama().te(lambda name: te_state("2.1", torch.tensor([64.0, 1.0, 1.0]), torch.zeros(1, 3)))
    process = run_command("export", model.write(tmp_path / "c"), tmp_path / "out")
    assert process.returncode == 0, process.stderr
