"""What a person does with ModelOpt and Megatron-Core without this program; a program of its own, run by the tests.

    python tests/calibrate/quantize_by_hand.py CHECKPOINT_OPTIONS.json FOLDER SCHEME ...

Builds the model of launch/make_checkpoint.py with the same options on one rank, quantises it by each scheme with the
token ids of `tokens`, and saves it as Megatron-LM does: FOLDER/SCHEME, and what the quantisers hold in
FOLDER/SCHEME.safetensors.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))

import make_checkpoint
import megatron_on_cpu
import portable_weights
import save_formats
import torch

CONFIGS = {"fp8": "FP8_DEFAULT_CFG", "int8_sq": "INT8_SMOOTHQUANT_CFG", "int4_awq": "INT4_AWQ_CFG"}
CONFIGS["nvfp4"] = "NVFP4_DEFAULT_CFG"


def tokens() -> list[list[int]]:
    """Four sequences."""
    return torch.randint(0, 250, (4, 48), generator=torch.Generator().manual_seed(1)).tolist()


def main(options: Any, folder: Path, schemes: list[str]) -> None:
    """Quantise and save by every scheme."""
    megatron_on_cpu.substitute_cuda()
    import modelopt.torch.quantization as mtq
    from modelopt.torch.opt.plugins.mcore_dist_checkpointing import save_sharded_modelopt_state
    from safetensors.torch import save_file

    store = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    megatron_on_cpu.start_model_parallel(options)
    mask = torch.triu(torch.ones(1, 1, 48, 48, dtype=torch.bool), 1)
    for scheme in schemes:
        chunks = megatron_on_cpu.build_chunks(options, megatron_on_cpu.STYLES[options.style])
        portable_weights.fill_chunks(chunks, seed=options.seed, vocab=options.vocab, zero_centered_gamma=False)
        model = chunks[0].eval()

        def run(model: Any) -> None:
            for sequence in tokens():
                model(torch.tensor([sequence]), torch.arange(48)[None], mask)

        with torch.no_grad():
            mtq.quantize(model, copy.deepcopy(getattr(mtq, CONFIGS[scheme])), run)
        options.out, options.singleton = folder / scheme, True
        save_formats.save(chunks, options)
        save_sharded_modelopt_state([model], str(options.out / f"iter_{options.iteration:07d}"))
        state = {name: value.clone() for name, value in model.state_dict().items() if "_quantizer." in name}
        save_file(state, folder / f"{scheme}.safetensors")


if __name__ == "__main__":
    _, given, target, *names = sys.argv
    arguments = [str(word) for pair in json.loads(given).items() for word in (f"--{pair[0]}", pair[1])]
    chosen = make_checkpoint.build_parser().parse_args([target, *arguments])
    make_checkpoint.resolve(chosen)
    main(chosen, Path(target), names)
