"""python tests/engines/record_signatures.py GIT_DIR COMMIT RELEASE ORIGIN > tests/engines/signatures/RELEASE.json

Records what the engine adapter calls from TensorRT-LLM's public source: parameters, fields and defaults, by parsing; no
code of it is kept or run. Defaults that are no literals are recorded as null.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from typing import Any

FUNCTIONS = {
    "tensorrt_llm/builder.py": ("build", "Engine.save"),
    "tensorrt_llm/models/modeling_utils.py": (
        "PretrainedConfig.from_dict",
        "PretrainedConfig.from_json_file",
        "PretrainedConfig.set_rank",
        "PretrainedModel.from_checkpoint",
        "PretrainedModel.from_config",
        "PretrainedModel.load",
        "preprocess_weights",
    ),
}
FIELDS = {
    "tensorrt_llm/builder.py": "BuildConfig",
    "tensorrt_llm/plugin/plugin.py": "PluginConfig",
    "tensorrt_llm/lora_manager.py": "LoraConfig",
    "tensorrt_llm/models/modeling_utils.py": "SpeculativeDecodingMode",
}


def main(git_dir: str, commit: str, release: str, origin: str) -> None:
    trees: dict[str, ast.Module] = {}
    for path in {*FUNCTIONS, *FIELDS, "tensorrt_llm/commands/build.py"}:
        command = ["git", f"--git-dir={git_dir}", "show", f"{commit}:{path}"]
        trees[path] = ast.parse(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    record: dict[str, Any] = {"release": release, "origin": origin, "functions": {}, "fields": {}}
    for path, names in FUNCTIONS.items():
        for name in names:
            record["functions"][name] = _parameters(_find(trees[path], name))
    for path, name in FIELDS.items():
        record["fields"][name] = _fields(_find(trees[path], name))
    record["options"] = _options(trees["tensorrt_llm/commands/build.py"])
    print(json.dumps(record, indent=1))


def _find(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = next(node for node in ast.walk(tree) if getattr(node, "name", None) == part)
    return tree


def _parameters(function: ast.FunctionDef) -> dict[str, list[str]]:
    arguments = function.args
    names = [each.arg for each in arguments.args if each.arg not in ("self", "cls")]
    required = len(names) - len(arguments.defaults)
    return {
        "required": names[:required],
        "optional": names[required:],
        "keyword_only": [each.arg for each in arguments.kwonlyargs],
    }


def _fields(node: ast.ClassDef) -> dict[str, object]:
    fields: dict[str, object] = {}
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            fields[each.target.id.lstrip("_")] = _default(each.value)
        elif isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name):
            fields[each.targets[0].id] = None
        elif isinstance(each, ast.FunctionDef) and each.name == "__init__" and not fields:
            fields |= {argument.arg: None for argument in each.args.args[1:]}
    return fields


def _default(value: ast.expr | None) -> object:
    if isinstance(value, ast.Call):
        value = next((each.value for each in value.keywords if each.arg == "default"), None)
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None


def _options(tree: ast.Module) -> dict[str, object]:
    """Flags of trtllm-build that are no plugin's -> default; ``BuildConfig.x`` is that field's."""
    found: dict[str, object] = {}
    for node in ast.walk(_find(tree, "parse_arguments")):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            default = next((each.value for each in node.keywords if each.arg == "default"), None)
            plain = ast.unparse(default) if isinstance(default, ast.Attribute) else _default(default)
            for flag in node.args:
                found[ast.literal_eval(flag).lstrip("-")] = plain
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
