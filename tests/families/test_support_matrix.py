"""The README's tables of what is supported are those that the code makes."""

from __future__ import annotations

from pathlib import Path

from dist_export.families import support
from dist_export.families.registry import FAMILIES

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_says_what_the_code_does() -> None:
    _, _, rest = README.read_text().partition("<!-- families: begin -->\n")
    table, found, _ = rest.partition("\n<!-- families: end -->")
    assert found and table == support.markdown(), "run `python -m dist_export families --markdown` and put it there"


def test_every_family_has_a_witness_for_every_target_it_has() -> None:
    for family in FAMILIES:
        assert set(family.witnesses) == set(family.architectures), family.name
        assert family.architectures, f"{family.name} cannot be exported"
