"""python tests/engines/record_signatures.py GIT_DIR COMMIT RELEASE ORIGIN [PREFIX] > signatures/RELEASE.json

Records what the engine adapter calls from TensorRT-LLM's public source: parameters, fields and defaults, by parsing; no
code of it is kept or run. Defaults that are no literals are recorded as null. PREFIX is the folder of the source inside
the repository, with a slash at its end.
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
    "tensorrt_llm/models/modeling_utils.py": "SpeculativeDecodingMode",
}
LORA = ("tensorrt_llm/lora_helper.py", "tensorrt_llm/lora_manager.py")
"""Where LoraConfig is, later releases first."""
NAMES = ("KVCacheType", "LoraConfig", "PluginConfig", "SpeculativeDecodingMode")
"""What builder.py imports for its BuildConfig."""


def main(git_dir: str, commit: str, release: str, origin: str, prefix: str = "") -> None:
    def tree(path: str) -> ast.Module | None:
        command = ["git", f"--git-dir={git_dir}", "show", f"{commit}:{prefix}{path}"]
        shown = subprocess.run(command, capture_output=True, text=True)
        return ast.parse(shown.stdout) if shown.returncode == 0 else None

    record: dict[str, Any] = {"release": release, "origin": origin, "names": {}, "functions": {}, "fields": {}}
    record["not_null"] = {}
    record["names"] = _names(tree("tensorrt_llm/builder.py"))
    for path, names in FUNCTIONS.items():
        for name in names:
            record["functions"][name] = _parameters(_find(tree(path), name))
    lora = next(path for path in LORA if tree(path) is not None and _defines(tree(path), "LoraConfig"))
    for path, name in {**FIELDS, lora: "LoraConfig"}.items():
        node = _find(tree(path), name)
        record["fields"][name] = _fields(node)
        if any(ast.unparse(base) == "BaseModel" for base in node.bases):
            record["not_null"][name] = _not_null(node)
    plugins = tree("tensorrt_llm/plugin/plugin.py")
    record["choices"] = _choices(plugins)
    record["options"] = _options(tree("tensorrt_llm/commands/build.py"))
    record["plugin_options"] = ast.literal_eval(_assigned(plugins, "cli_plugin_args"))
    print(json.dumps(record, indent=1))


def _find(tree: Any, name: str) -> Any:
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef)
        tree = next(node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == part)
    return tree


def _defines(tree: Any, name: str) -> bool:
    return any(isinstance(node, ast.ClassDef) and node.name == name for node in ast.walk(tree))


def _assigned(tree: Any, name: str) -> Any:
    """The value of a module's variable."""
    return next(
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )


def _names(tree: Any) -> dict[str, str]:
    """Name that builder.py imports -> module below tensorrt_llm."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            found |= {each.name: node.module for each in node.names if each.name in NAMES}
    return found


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
    fields.pop("model_config", None)  # pydantic's own
    return fields


def _not_null(node: ast.ClassDef) -> list[str]:
    """Fields of a pydantic model that refuse None."""
    found = []
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and "Optional" not in ast.unparse(each.annotation):
            found.append(ast.unparse(each.target))
    return [name for name in found if not name.startswith("_")]


def _choices(tree: Any) -> dict[str, list[str | None]]:
    """Values that a plugin's field takes, where they are not those of "default"."""
    try:
        default = ast.literal_eval(_assigned(tree, "DEFAULT_PLUGIN_DTYPE_OPTIONS"))
        return {"default": default, **ast.literal_eval(_assigned(tree, "PLUGIN_DTYPE_OPTIONS_MAP"))}
    except StopIteration:  # a pydantic model: they are in the annotations
        found = {"default": _literals(_assigned(tree, "DefaultPluginDtype"))}
        for each in _find(tree, "PluginConfig").body:
            if isinstance(each, ast.AnnAssign) and _literals(each.annotation):
                found[ast.unparse(each.target)] = _literals(each.annotation)
        return found


def _literals(annotation: ast.expr) -> list[str | None]:
    """``Optional[Literal["fp8", None]]`` -> ["fp8", None]; [] without a Literal."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            return list(ast.literal_eval(node.slice))
    return []


def _default(value: ast.expr | None) -> object:
    if isinstance(value, ast.Call):
        value = next((each.value for each in value.keywords if each.arg == "default"), None)
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None


def _options(tree: Any) -> dict[str, object]:
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
