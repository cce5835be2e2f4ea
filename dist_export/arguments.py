"""Command-line arguments, and what they name: a source, targets, a job. Shared by every way to start an export."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dist_export.errors import ExportError

if TYPE_CHECKING:
    from dist_export.api import OpenedModel, Source, TargetOptions
    from dist_export.checkpoint.open import Checkpoint
    from dist_export.plan.job import ExportJob

_SUFFIXES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """``512m``, ``1GiB`` or ``1073741824`` -> bytes."""
    lowered = text.strip().lower().removesuffix("ib").removesuffix("b")
    number, suffix = (lowered[:-1], lowered[-1:]) if lowered[-1:] in _SUFFIXES else (lowered, "")
    try:
        size = int(float(number) * _SUFFIXES[suffix])
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512m or 2g")
    return size


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of a verification."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="what was exported")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the export; of several targets each is verified")
    parser.add_argument("--base", type=Path, metavar="DIR", help="where the base model of adapters is now; "
                        "default: where it was when they were merged")  # fmt: skip
    parser.add_argument("--allow-mapping-code", action="store_true",
                        help="run the Python file that the export was made with")  # fmt: skip
    parser.add_argument("--levels", nargs="+", choices=("checksums", "coverage", "rebuild"),
                        help="default: all; rebuild compares every byte with the checkpoint")  # fmt: skip
    parser.add_argument("--logits", action="store_true", help="also run tokens through both models (needs torch, "
                        "megatron-core, and transformers for hf)")  # fmt: skip
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="--logits: token ids, one sequence per line")
    parser.add_argument("--sha256", action="store_true", help="print SHA-256 of every file, for evidence")
    parser.add_argument("--num-processes", type=positive, metavar="N", help="default: cores")
    parser.add_argument("--num-threads", type=positive, default=2, metavar="N", help="per process, default 2")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def add_export_arguments(parser: argparse.ArgumentParser, *, launched: bool = False) -> None:
    """Arguments of an export; the same whoever starts the processes."""
    parser.usage = "%(prog)s CHECKPOINT OUTPUT [options]"  # all of them would fill half a screen
    add_source_arguments(parser)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to create; its parent must exist")
    add_target_arguments(parser)
    run = parser.add_argument_group("running")
    if not launched:
        run.add_argument("--num-processes", type=positive, metavar="N", help="default: target ranks, at most cores")
    run.add_argument("--resume", action="store_true", help="go on where the same export was stopped, if it was")
    run.add_argument("--overwrite", action="store_true", help="replace an export at OUTPUT once the new one is whole")
    run.add_argument("--host-memory", type=parse_size, metavar="SIZE",
                     help="buffers per process, default 1g or what a container's limit allows")  # fmt: skip
    run.add_argument("--local-staging", type=Path, metavar="DIR",
                     help="write to this folder of each node's own disk first, then gather")  # fmt: skip
    run.add_argument("--num-threads", type=positive, metavar="N", help="per process, default 2; 1 if cores are few")
    run.add_argument("--device", default="auto", help="for arithmetic: auto (default), cpu, cuda, cuda:N")
    run.add_argument("--device-memory", type=parse_size, default=2 << 30, metavar="SIZE",
                     help="of a GPU, per process, default 2g")  # fmt: skip
    run.add_argument("--profile", type=Path, metavar="DIR",
                     help="a summary of the time, and every rank's timeline here")  # fmt: skip
    run.add_argument("--sha256", action="store_true", help="SHA-256 of every file in the manifest, for evidence")
    run.add_argument("--log-json", action="store_true", help="events as JSON lines on standard error, no text there")
    run.add_argument("--progress-file", type=Path, metavar="FILE", help="keep a JSON file with the state, each second")
    engine = parser.add_argument_group("engines (TensorRT-LLM 0.12 to 1.2)")
    engine.add_argument("--build-engine", type=Path, metavar="DIR", help="then build every rank's engine into DIR")
    _add_engine_options(engine)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dist-export engine``, among them the options of trtllm-build as they are."""
    from dist_export.engines.option_help import EPILOG, help_of, metavar_of
    from dist_export.engines.options import option_flags

    parser.usage = "%(prog)s OUTPUT ENGINES [options] [--max_batch_size N and others of trtllm-build]"
    parser.formatter_class = partial(argparse.RawDescriptionHelpFormatter, max_help_position=38, width=98)
    parser.epilog = EPILOG
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a published export for TensorRT-LLM")
    parser.add_argument("engines", type=Path, metavar="ENGINES", help="folder of engines to create")
    parser.add_argument("--overwrite", action="store_true", help="replace the engines at ENGINES")
    _add_engine_options(parser)
    group = parser.add_argument_group("options of trtllm-build (also with - for _)")
    for name, is_switch in option_flags().items():
        flag = group.add_argument(
            f"--{name}", dest=f"engine:{name}", default=argparse.SUPPRESS, metavar=metavar_of(name), help=help_of(name)
        )
        if is_switch:
            flag.nargs, flag.const = "?", "enable"
        if "_" in name:
            other = parser.add_argument(
                f"--{name.replace('_', '-')}", dest=f"engine:{name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )
            other.nargs, other.const = flag.nargs, flag.const


def _add_engine_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--engine-config", type=Path, metavar="FILE", help="YAML with options of trtllm-build")
    parser.add_argument("--engine-option", action="append", default=[], metavar="NAME=VALUE",
                        help="one of them, such as max_batch_size=64; repeatable")  # fmt: skip


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that name a checkpoint and say what it does not."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT",
                        help="Megatron --save folder (its latest iteration) or an iter_ folder")  # fmt: skip
    source = parser.add_argument_group("source")
    source.add_argument("--iteration", type=positive, metavar="N", help="this iteration instead of the latest")
    source.add_argument("--index-cache", type=Path, metavar="FILE",
                        help="keep the parsed metadata in this file and take it from there")  # fmt: skip
    source.add_argument("--base", type=Path, metavar="DIR",
                        help="the model that the adapters in CHECKPOINT belong to")  # fmt: skip
    source.add_argument("--master-weights", action="store_true",
                        help="take the fp32 weights out of the optimizer's state")  # fmt: skip
    source.add_argument("--quantization", default="auto", metavar="SCHEME",
                        choices=("auto", "none", "fp8", "fp8_per_channel", "nvfp4", "int8_wo", "int4_wo",
                                 "int8_sq", "int4_awq"),
                        help="auto (default): as it was calibrated; none, fp8, fp8_per_channel, nvfp4, "
                             "int8_wo, int4_wo, int8_sq, int4_awq")  # fmt: skip
    source.add_argument("--calibration", type=Path, metavar="FILE", help="safetensors with amax values of quantisers")
    source.add_argument("--exclude", action="append", default=[], metavar="PATTERN",
                        help="Megatron modules that are not quantised; repeatable")  # fmt: skip
    source.add_argument("--kv-cache", default="auto", metavar="KIND", choices=("auto", "none", "fp8", "int8"),
                        help="its quantisation: auto (default), none, fp8, int8")  # fmt: skip
    source.add_argument("--kv-cache-scale", type=float, metavar="X", help="of every layer, where none was calibrated")
    source.add_argument("--te-version", metavar="X.Y",
                        help="TransformerEngine's release in training, for FP8 scales of experts")  # fmt: skip
    source.add_argument("--family", metavar="NAME", help="model family, where it is not to be found out")
    source.add_argument("--mapping", type=Path, metavar="FILE", help="YAML with rules for a model of your own")
    source.add_argument("--allow-mapping-code", action="store_true", help="let --mapping be a Python file, and run it")
    source.add_argument("--vocab-size", type=positive, metavar="N", help="the tokenizer's true vocabulary size")
    source.add_argument("--config", type=Path, metavar="FILE", help="YAML or JSON with model configuration fields")
    source.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="one field; repeatable")


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say what to make."""
    target = parser.add_argument_group("target")
    target.add_argument("--target", action="append", metavar="NAME", choices=("trtllm", "hf"),
                        help="trtllm (default) or hf; given twice: both, in subfolders")  # fmt: skip
    target.add_argument("--hf-reference", type=Path, metavar="DIR",
                        help="hf: folder of the same model: configuration, tokenizer")  # fmt: skip
    target.add_argument("--hf-quantization-format", default="auto", metavar="X",
                        choices=("auto", "modelopt", "compressed-tensors"),
                        help="hf: auto (default, read by vLLM), modelopt, compressed-tensors")  # fmt: skip
    target.add_argument("--tokenizer", type=Path, metavar="DIR", help="hf: a folder with tokenizer files")
    target.add_argument("--max-file-size", type=parse_size, default=5 << 30, metavar="SIZE",
                        help="hf: largest file, default 5g")  # fmt: skip
    target.add_argument("--tp", type=positive, default=1, metavar="N", help="tensor parallel size, default 1")
    target.add_argument("--pp", type=positive, default=1, metavar="N", help="pipeline parallel size, default 1")
    target.add_argument("--moe-ep", type=positive, default=1, metavar="N",
                        help="expert parallel size, a divisor of tp; default 1")  # fmt: skip
    target.add_argument("--dtype", default="bfloat16", metavar="TYPE", choices=("float32", "float16", "bfloat16"),
                        help="bfloat16 (default), float16, float32")  # fmt: skip
    target.add_argument("--trtllm-version", metavar="X.Y", help="export for this release; default: 0.12 to 1.2")
    target.add_argument("--no-parallel-embedding", action="store_true", help="every rank holds the whole embedding")
    target.add_argument("--embedding-sharding-dim", type=int, default=0, metavar="DIM", choices=(0, 1),
                        help="0 vocabulary (default), 1 hidden")  # fmt: skip


def overrides_of(options: argparse.Namespace) -> dict[str, tuple[object, str]]:
    """Configuration fields that a command line gives, and where it gave them."""
    from dist_export.models.resolve import overrides_from_file, parse_override

    overrides = overrides_from_file(options.config) if options.config else {}
    for assignment in options.set:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ExportError(f"--set {assignment}: expected FIELD=VALUE")
        overrides[name] = (parse_override(name, text), "command line")
    if options.vocab_size:
        overrides["vocab_size"] = (options.vocab_size, "command line")
    elif getattr(options, "hf_reference", None) and "vocab_size" not in overrides:
        from dist_export.targets.huggingface.reference import Reference

        size = Reference.read(options.hf_reference).vocab_size
        if size is not None:
            overrides["vocab_size"] = (size, f"Hugging Face reference {options.hf_reference}")
    return overrides


def source_of(options: argparse.Namespace) -> Source:
    """The source a command line names."""
    from dist_export.api import Source
    from dist_export.quantization import QuantizationOptions

    mapping = None
    if options.mapping:
        from dist_export.families.mapping import mapping_from

        mapping = mapping_from(options.mapping, code_allowed=options.allow_mapping_code)
    return Source(
        checkpoint=options.checkpoint,
        iteration=options.iteration,
        overrides=overrides_of(options),
        family=options.family,
        index_cache=options.index_cache,
        base=options.base,
        master_weights=options.master_weights,
        quantization=QuantizationOptions(
            algorithm=options.quantization,
            exclude=tuple(options.exclude),
            kv_cache=options.kv_cache,
            kv_cache_scale=options.kv_cache_scale,
            te_version=options.te_version,
        ),
        calibration=options.calibration,
        mapping=mapping,
    )


def targets_of(options: argparse.Namespace) -> list[TargetOptions]:
    """The targets a command line names, each once, in the order given."""
    from dist_export.targets.huggingface.target import HuggingFaceOptions
    from dist_export.targets.trtllm.tables import EmbeddingSharding
    from dist_export.targets.trtllm.target import TrtllmOptions

    trtllm = TrtllmOptions(
        tp_size=options.tp,
        pp_size=options.pp,
        moe_ep_size=options.moe_ep,
        dtype=options.dtype,
        embedding=EmbeddingSharding(not options.no_parallel_embedding, options.embedding_sharding_dim),
        release=options.trtllm_version,
    )
    huggingface = HuggingFaceOptions(
        dtype=options.dtype,
        file_bytes=options.max_file_size,
        reference=str(options.hf_reference.absolute()) if options.hf_reference else None,
        tokenizer=str(options.tokenizer.absolute()) if options.tokenizer else None,
        quantization_format=options.hf_quantization_format,
    )
    made: dict[str, TargetOptions] = {"trtllm": trtllm, "hf": huggingface}
    return [made[name] for name in dict.fromkeys(options.target or ["trtllm"])]


def make_job(
    options: argparse.Namespace, source: Source, checkpoint: Checkpoint | None = None
) -> tuple[OpenedModel, ExportJob]:
    """The checkpoint of `source` (opened here unless it is given) and the plans that a command line asks for."""
    from dist_export import api

    model = api.open_model(source, checkpoint)
    return model, api.plan_job(model, targets_of(options), family=source.family)


def request_of(options: argparse.Namespace, source: Source) -> dict[str, object]:
    """What was asked of the source, as plain values for the manifest."""
    from msgspec import Struct, to_builtins

    plain = {
        name: to_builtins(value) if isinstance(value, Struct) else value
        for name, (value, _) in source.overrides.items()
    }
    request: dict[str, object] = {"iteration": source.iteration, "family": source.family, "overrides": plain}
    if source.base is not None:
        request["base"] = str(source.base.absolute())
    if source.master_weights:
        request["master_weights"] = True
    if source.calibration is not None:
        request["calibration"] = str(source.calibration.absolute())
    if source.mapping is not None:
        plain_mapping = getattr(source.mapping, "content", None)
        request["mapping"] = plain_mapping if plain_mapping is not None else str(options.mapping.absolute())
    if source.quantization != type(source.quantization)():
        request["quantization"] = to_builtins(source.quantization)
    return request
