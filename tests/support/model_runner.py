"""A stand-in for TensorRT-LLM's ModelRunner, which needs a GPU and an engine: it takes what its public source takes.

    python tests/support/model_runner.py RELEASE GIT_DIR COMMIT ORIGIN [PREFIX] > model_runner/RELEASE.json

records parameters and fields from that source, by parsing; no code of it is kept or run. PREFIX is the folder of the
source inside the repository, with a slash at its end.
"""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).with_name("model_runner")
RELEASES = tuple(sorted(path.stem for path in RECORDS.glob("*.json")))
METHODS = ("from_dir", "generate")
EXPORTS = {"tensorrt_llm/__init__.py": "mpi_rank", "tensorrt_llm/runtime/__init__.py": "ModelRunner"}


class StandIn:
    """Notes every call; from every prompt it goes on with `answer`, padded as a batch is."""

    def __init__(self, release: str, answer: list[int], *, rank: int = 0) -> None:
        self.record: dict[str, Any] = json.loads((RECORDS / f"{release}.json").read_text())
        self.answer, self.rank = answer, rank
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def modules(self) -> dict[str, types.ModuleType]:
        """For `sys.modules`."""
        package, runtime = types.ModuleType("tensorrt_llm"), types.ModuleType("tensorrt_llm.runtime")
        package.mpi_rank = lambda: self.rank  # type: ignore[attr-defined]
        runner = types.SimpleNamespace(from_dir=self._from_dir)
        runtime.ModelRunner = runner  # type: ignore[attr-defined]
        return {"tensorrt_llm": package, "tensorrt_llm.runtime": runtime}

    def _from_dir(self, *args: Any, **kwargs: Any) -> Any:
        self._note("from_dir", args, kwargs)
        return types.SimpleNamespace(generate=self._generate)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        bound = self._note("generate", args, kwargs)
        settings = bound.get("kwargs", {})
        unknown = set(settings) - set(self.record["sampling_config"])
        assert not unknown, f"SamplingConfig has no {unknown}"
        (prompt,) = bound["batch_input_ids"]
        assert prompt.dtype == torch.int32
        assert prompt.dim() == 1
        length = len(prompt) + settings["max_new_tokens"]
        row = [*prompt.tolist(), *self.answer][:length]
        row += [settings["pad_id"]] * (length - len(row))
        return torch.tensor([[row]], dtype=torch.int32)

    def _note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Raises TypeError where the release does not take the arguments."""
        of = self.record[name]
        plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(each, plain) for each in of["required"]]
        parameters += [inspect.Parameter(each, plain, default=None) for each in of["optional"]]
        only = inspect.Parameter.KEYWORD_ONLY
        parameters += [inspect.Parameter(each, only, default=None) for each in of["keyword_only"]]
        if of["takes_more"]:
            parameters.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD))
        bound = dict(inspect.Signature(parameters).bind(*args, **kwargs).arguments)
        self.calls.append((name, bound))
        return bound


def record(release: str, git_dir: str, commit: str, origin: str, prefix: str = "") -> None:
    """Print what the source at a commit takes."""

    def source(path: str) -> str:
        command = ["git", f"--git-dir={git_dir}", "show", f"{commit}:{prefix}{path}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    for path, name in EXPORTS.items():
        assert name in source(path), f"{path} has no {name}"
    found: dict[str, Any] = {"release": release, "origin": origin}
    runner = _class(source("tensorrt_llm/runtime/model_runner.py"), "ModelRunner")
    for method in METHODS:
        arguments = next(each for each in runner.body if isinstance(each, ast.FunctionDef) and each.name == method).args
        names = [each.arg for each in arguments.args[1:]]
        required = len(names) - len(arguments.defaults)
        found[method] = {
            "required": names[:required],
            "optional": names[required:],
            "keyword_only": [each.arg for each in arguments.kwonlyargs],
            "takes_more": arguments.kwarg is not None,
        }
    config = _class(source("tensorrt_llm/runtime/generation.py"), "SamplingConfig")
    found["sampling_config"] = [each.target.id for each in config.body if isinstance(each, ast.AnnAssign)]  # type: ignore[union-attr]
    print(json.dumps(found, indent=1))


def _class(source: str, name: str) -> ast.ClassDef:
    return next(each for each in ast.parse(source).body if isinstance(each, ast.ClassDef) and each.name == name)


if __name__ == "__main__":
    record(*sys.argv[1:])
