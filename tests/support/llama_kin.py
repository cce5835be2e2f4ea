"""Make small real checkpoints of the families on the Llama base: launch/make_checkpoint.py with what sets each apart.

    python tests/support/llama_kin.py qwen2 OUT [--tp 2 --pp 2 … options of launch/make_checkpoint.py]

The checkpoints of these families in tests/conformance/checkpoints were made so, with `--tp 2`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))

import make_checkpoint
import megatron_on_cpu
import save_formats

SIZES = "--layers 2 --hidden 32 --heads 8 --kv-groups 2 --ffn 48 --vocab 121 --seq 32 --norm-epsilon 1e-6 --seed 7"
"""Two key/value heads, fewer than the ranks at tp 4; a vocabulary that needs padding rows there."""
EXPERTS = "--experts 4 --top-k 2 --moe-ffn 24"


@dataclasses.dataclass(frozen=True)
class Kin:
    """What sets a family's small model apart from a Llama or Mixtral one."""

    options: str
    """Of launch/make_checkpoint.py."""
    config: dict[str, Any]
    """Fields of TransformerConfig; Megatron-LM's arguments have the same names, but for `RENAMED`."""
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments that are no fields of TransformerConfig."""
    tied: bool = False


FAMILIES = {
    "qwen2": Kin("--rotary-base 1000000", {"add_qkv_bias": True}, tied=True),
    "mistral": Kin("--head-size 8 --rotary-base 1000000", {"window_size": (15, 0)}),
    "qwen3": Kin("--head-size 8 --rotary-base 1000000", {"qk_layernorm": True}, tied=True),
    "qwen3_moe": Kin(f"--head-size 8 {EXPERTS} --rotary-base 1000000", {"qk_layernorm": True}),
    "qwen2_moe": Kin(
        f"{EXPERTS} --shared-expert-ffn 40 --shared-expert-gate --rotary-base 1000000",
        {"add_qkv_bias": True, "moe_router_pre_softmax": True},
    ),
    "llama3": Kin(
        "--rotary-base 500000 --norm-epsilon 1e-5",
        {},
        {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
        tied=True,
    ),
}

RENAMED: dict[str, str] = {}
_NOT_BUILT = ("window_size",)
"""Attention of the local spec has no window; it leaves weights alone."""


def substitute(kin: Kin) -> None:
    """Have the modules of launch/ build and describe `kin`. Called once, before the ranks are forked."""
    build_config, describe = megatron_on_cpu.transformer_config, save_formats.training_arguments

    def transformer_config(*arguments: Any) -> Any:
        fields = {name: value for name, value in kin.config.items() if name not in _NOT_BUILT}
        return dataclasses.replace(build_config(*arguments), **fields)

    def training_arguments(*arguments: Any) -> argparse.Namespace:
        saved = describe(*arguments)
        vars(saved).update({RENAMED.get(name, name): value for name, value in kin.config.items()} | kin.arguments)
        return saved

    megatron_on_cpu.transformer_config = transformer_config
    save_formats.training_arguments = training_arguments
    for name, style in list(megatron_on_cpu.STYLES.items()):
        megatron_on_cpu.STYLES[name] = dataclasses.replace(style, tied=kin.tied)


def options_of(name: str, out: Path, more: list[str]) -> argparse.Namespace:
    """The options of launch/make_checkpoint.py for a family, resolved."""
    options = make_checkpoint.build_parser().parse_args(
        [str(out), *SIZES.split(), *FAMILIES[name].options.split(), *more]
    )
    make_checkpoint.resolve(options)
    return options


def main() -> None:
    """Make the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("out", type=Path)
    known, more = parser.parse_known_args()
    substitute(FAMILIES[known.family])
    make_checkpoint.start_processes(options_of(known.family, known.out, more))


if __name__ == "__main__":
    main()
