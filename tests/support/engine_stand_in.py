"""A stand-in for TensorRT-LLM, which cannot be installed here: it takes what the recorded signatures take, and no more.

`install` writes a package ``tensorrt_llm`` into a folder for PYTHONPATH. Its classes and functions have the parameters,
fields and defaults of one release (signatures/*.json); unknown ones fail as the real ones would. Nothing is computed:
calls are noted in a file, and "an engine" is a few bytes.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

SIGNATURES = Path(__file__).parents[1] / "engines" / "signatures"
RECORDED = tuple(
    sorted((path.stem for path in SIGNATURES.glob("*.json")), key=lambda name: tuple(map(int, name.split("."))))
)

_PACKAGE = '''
import copy, dataclasses, json, os, pathlib, sys, types
RECORD = json.loads(pathlib.Path(__file__).with_name("record.json").read_text())

def note(name, **arguments):
    with open(os.environ["STAND_IN_CALLS"], "a") as file:
        line = {"call": name, "arguments": {k: repr(v) if isinstance(v, Thing) else v for k, v in arguments.items()},
                "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid(),
                "launcher": [n for n in os.environ if n.startswith(("SLURM_", "OMPI_COMM", "PMI")) or n == "RANK"]}
        file.write(json.dumps(line, default=repr) + "\\n")

class Thing:
    pass

def bind(name, args, kwargs):
    """The arguments by name, as a function with the recorded signature takes them."""
    signature = RECORD["functions"][name]
    names = [*signature["required"], *signature["optional"]]
    if len(args) > len(names):
        raise TypeError(f"{name}() takes {len(names)} arguments")
    bound = dict(zip(names, args))
    for key, value in kwargs.items():
        if key not in names + signature["keyword_only"] or key in bound:
            raise TypeError(f"{name}() got an unexpected keyword argument {key}")
        bound[key] = value
    missing = [key for key in signature["required"] if key not in bound]
    if missing:
        raise TypeError(f"{name}() misses {missing}")
    return bound

class KVCacheType:
    CONTINUOUS, PAGED, DISABLED = "KVCacheType.CONTINUOUS", "KVCacheType.PAGED", "KVCacheType.DISABLED"

FIELDS, NOT_NULL, CHOICES = RECORD["fields"], RECORD["not_null"], RECORD["choices"]
MODES = {n: f"SpeculativeDecodingMode.{n}" for n in FIELDS["SpeculativeDecodingMode"]}
SpeculativeDecodingMode = types.SimpleNamespace(**MODES)

def config_class(name):
    """A dataclass, or as pydantic has it: `model_fields`, and no None for a field that is not Optional."""
    if name not in NOT_NULL:
        return dataclasses.make_dataclass(
            name, [(n, object, dataclasses.field(default=d)) for n, d in FIELDS[name].items()])
    class Model(Thing):
        model_fields = FIELDS[name]
        def __init__(self, **kwargs):
            unknown = set(kwargs) - set(FIELDS[name])
            null = [key for key, value in kwargs.items() if value is None and key in NOT_NULL[name]]
            if unknown or null:
                raise ValueError(f"{name}: unexpected {unknown}, None for {null}")
            self.__dict__.update(FIELDS[name] | kwargs)
        def __repr__(self):
            return f"{name}({self.__dict__})"
    return Model

BuildConfig, LoraConfig = config_class("BuildConfig"), config_class("LoraConfig")

class PluginConfig(Thing):
    """Checks what is assigned, in every release."""
    __slots__ = (*FIELDS["PluginConfig"], *(["_explicitly_disable_gemm_plugin"] * (
        "explicitly_disable_gemm_plugin" in FIELDS["PluginConfig"])))
    def __init__(self):
        for name in self.__slots__:
            object.__setattr__(self, name, FIELDS["PluginConfig"].get(name, False))
    def __setattr__(self, name, value):
        default = FIELDS["PluginConfig"].get(name, False)
        if isinstance(default, bool):
            assert isinstance(value, bool), f"Plugin {name} expects bool, got {value!r}"
        elif name.endswith("_plugin"):
            assert value in CHOICES.get(name, CHOICES["default"]), f"Plugin {name} expects no {value!r}"
        object.__setattr__(self, name, value)
    def values(self):
        return {name: getattr(self, name) for name in self.__slots__}
    def __repr__(self):
        return "PluginConfig" + repr(self.values())

class PretrainedConfig(Thing):
    def __init__(self, values):
        self.values, self.architecture, self.rank, self.logits_dtype = values, values["architecture"], 0, "float32"
    @classmethod
    def from_json_file(cls, *args, **kwargs):
        path = bind("PretrainedConfig.from_json_file", args, kwargs)["config_file"]
        return cls(json.loads(pathlib.Path(path).read_text()))
    @classmethod
    def from_dict(cls, *args, **kwargs):
        return cls(bind("PretrainedConfig.from_dict", args, kwargs)["config"])
    def set_rank(self, *args, **kwargs):
        self.rank = bind("PretrainedConfig.set_rank", args, kwargs)["rank"]
    def __repr__(self):
        return f"config of rank {self.rank}"

class Model(Thing):
    def __init__(self, config):
        self.config = config
    @classmethod
    def from_checkpoint(cls, *args, **kwargs):
        bound = bind("PretrainedModel.from_checkpoint", args, kwargs)
        note("from_checkpoint", **bound)
        path = pathlib.Path(bound["ckpt_dir"]) / f"rank{bound['config'].rank}.safetensors"
        assert path.is_file(), path
        return cls(bound["config"])
    @classmethod
    def from_config(cls, *args, **kwargs):
        return cls(bind("PretrainedModel.from_config", args, kwargs)["config"])
    def load(self, *args, **kwargs):
        note("load", names=sorted(bind("PretrainedModel.load", args, kwargs)["weights"]))

MODEL_MAP = {"LlamaForCausalLM": Model, "GPTForCausalLM": Model}

def preprocess_weights(*args, **kwargs):
    bound = bind("preprocess_weights", args, kwargs)
    note("preprocess_weights", config=bound["model_config"])
    return None if RECORD["release"] in ("0.12", "0.13") else dict(bound["weights"])

class Engine(Thing):
    def __init__(self, config, build_config):
        self.config = types.SimpleNamespace(pretrained_config=config, build_config=copy.copy(build_config))
        self.engine = None if build_config.dry_run else b"engine"
    def save(self, *args, **kwargs):
        folder = pathlib.Path(bind("Engine.save", args, kwargs)["engine_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.pretrained_config
        (folder / f"rank{config.rank}.engine").write_bytes(self.engine)
        if config.rank == 0:
            told = {"pretrained_config": config.values,
                    "build_config": {"output_timing_cache": self.config.build_config.output_timing_cache}}
            (folder / "config.json").write_text(json.dumps(told))

def build(*args, **kwargs):
    """The stand-in for what cannot be had: it notes what it was given."""
    bound = bind("build", args, kwargs)
    config = bound["build_config"]
    plain = {name: getattr(config, name) for name in FIELDS["BuildConfig"] if name != "plugin_config"}
    if config.output_timing_cache is not None and bound["model"].config.rank == 0:
        pathlib.Path(config.output_timing_cache).write_bytes(b"timings")
    if os.environ.get("STAND_IN_FAILS") == str(bound["model"].config.rank):
        print("[TRT] [E] out of workspace", file=sys.stderr)
        sys.exit(3)
    note("build", rank=bound["model"].config.rank, logits=bound["model"].config.logits_dtype,
         config=plain, plugin=config.plugin_config.values())
    return Engine(bound["model"].config, config)

class logger:
    set_level = staticmethod(lambda level: None)

def module(name, **members):
    full = f"tensorrt_llm.{name}"
    sys.modules[full] = made = types.ModuleType(full)
    made.__dict__.update(members)
    setattr(sys.modules["tensorrt_llm"], name.rpartition(".")[2], made)

note("import")
module("logger", logger=logger)
module("models", MODEL_MAP=MODEL_MAP, PretrainedConfig=PretrainedConfig)
sys.modules["tensorrt_llm.models"].__path__ = []
module("models.modeling_utils", preprocess_weights=preprocess_weights)
imported = {name: globals()[name] for name in RECORD["names"]}  # what is in builder.py, whatever module it is from
module("builder", BuildConfig=BuildConfig, Engine=Engine, build=build, **imported)
'''


def install(folder: Path, recorded: str, *, version: str | None = None) -> dict[str, str]:
    """Write the stand-in for a recorded release; returns the environment to run with. Calls go to `calls_in`."""
    package = folder / "site" / "tensorrt_llm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(_PACKAGE)
    (package / "record.json").write_text((SIGNATURES / f"{recorded}.json").read_text())
    info = package.parent / f"tensorrt_llm-{version or recorded + '.0'}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {version or recorded + '.0'}\n"
    (info / "METADATA").write_text(metadata)
    return {"PYTHONPATH": str(package.parent), "STAND_IN_CALLS": str(folder / "calls")}


def record_of(recorded: str) -> dict[str, Any]:
    """What was recorded of a release."""
    record: dict[str, Any] = json.loads((SIGNATURES / f"{recorded}.json").read_text())
    return record


def gpus(folder: Path, *capabilities: str) -> dict[str, str]:
    """An nvidia-smi that tells of GPUs with these compute capabilities; returns the environment to run with."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    lines = "".join(f"{n}, GPU-{n:04d}, {each}, NVIDIA Stand-in {n}\n" for n, each in enumerate(capabilities))
    program = programs / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<END\n{lines}END\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    # All of them visible, whatever another test's import of Megatron on a CPU has left in this process's environment.
    visible = ",".join(map(str, range(len(capabilities))))
    return {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": visible}


def calls_in(folder: Path) -> list[dict[str, Any]]:
    """Everything that was called, in order."""
    path = folder / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
