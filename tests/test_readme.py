"""What the README says can be found in the program: messages, options, commands, extras, exit codes, the version."""

from __future__ import annotations

import argparse
import ast
import configparser
import re
from pathlib import Path

import pytest

import dist_export
from dist_export.cli import build_parser
from dist_export.runtime import exit_codes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OF_OTHERS = {
    *("--save", "--editable", "--no-deps"),  # Megatron-LM, pip
    *("--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint"),  # torchrun
    *("--nodes", "--ntasks-per-node", "--wrap", "--checkpoint_dir"),  # sbatch, trtllm-build
}


def section(heading: str) -> str:
    """The text below a heading, up to the next of its level or above."""
    level = heading.index(" ")
    found = re.search(rf"(?ms)^{re.escape(heading)}\n(.*?)(?=^#{{1,{level}}} |\Z)", README)
    assert found, f"the README has no {heading}"
    return found[1]


def first_cells(table: str) -> list[str]:
    """What is quoted in the first column."""
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    return [word for row in rows[1:] for word in re.findall(r"`([^`]+)`", row)]


def text_of(node: ast.expr) -> str:
    """The text of a string expression, with a hole for whatever is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "\0"


@pytest.fixture(scope="module")
def texts() -> str:
    """All strings of the program."""
    trees = (ast.parse(path.read_text()) for path in (ROOT / "dist_export").rglob("*.py"))
    nodes = (node for tree in trees for node in ast.walk(tree))
    return "\n".join(text_of(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr))


@pytest.mark.parametrize("message", first_cells(section("## When something is refused")))
def test_messages_are_ones_that_the_program_prints(message: str, texts: str) -> None:
    parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
    assert parts and re.search("[^\n]*".join(parts), texts), f"no text of the program reads {message!r}"


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Command -> its parser."""
    actions = build_parser()._actions
    return dict(next(each.choices for each in actions if isinstance(each, argparse._SubParsersAction)))


def test_options_exist() -> None:
    known = {"--version", "--help", *OF_OTHERS}
    known |= {option for parser in parsers().values() for option in parser._option_string_actions}
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", README))
    assert mentioned <= known, sorted(mentioned - known)


def test_options_of_an_export_are_all_there() -> None:
    table = section("### Options")
    missing = [name for name in parsers()["export"]._option_string_actions if f"`{name}" not in table]
    assert sorted(missing) == ["--help", "-h"]


def test_commands_are_all_mentioned() -> None:
    assert [name for name in parsers() if f"dist-export {name}" not in README] == []


def test_exit_codes() -> None:
    rows = re.findall(r"(?m)^\| (\d[\d, ]*) \|", section("### Exit codes"))
    said = {int(code) for row in rows for code in row.split(", ")}
    assert said == {value for name, value in vars(exit_codes).items() if name.isupper()}


def test_the_version_has_its_changes() -> None:
    assert re.search(r"### (\S+)", section("## Changes"))[1] == dist_export.__version__  # type: ignore[index]


def test_extras_are_those_of_the_package() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert set(first_cells(section("## Install"))) >= set(settings["options.extras_require"])


def test_links_lead_somewhere() -> None:
    titles = re.findall(r"(?m)^#{1,3} (.*)$", re.sub(r"(?ms)^```.*?^```", "", README))
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert link[1:] in anchors if link.startswith("#") else (ROOT / link).is_file(), link
