"""CONTRIBUTING.md gives five steps for each kind of addition, and CITATION.cff is this version's.

tests/repository/test_paths.py checks that every file that they name exists.
"""

import re

import pytest
import yaml

import moe_jax
from tests.repository.sources import ROOT
from tests.repository.test_paths import BELOW, FILE

KINDS = (
    "A routing rule",
    "A kernel",
    "A pipeline schedule",
    "A hardware row",
    "A data set",
    "An experiment",
)


def sections() -> dict[str, str]:
    """heading -> its text."""
    parts = re.split(r"^## (.+)$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_kind_has_its_section():
    assert tuple(sections()) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_section_has_five_steps_and_names_a_source_and_a_place_of_its_test(kind):
    text = sections()[kind]
    assert re.findall(r"^(\d)\. ", text, flags=re.MULTILINE) == list("12345")
    named = {name for pattern in (FILE, BELOW) for name in pattern.findall(text)}
    assert any(name.startswith("tests/") for name in named), "where does its test go?"
    assert any(name.startswith(("moe_jax/", "kernels/", "experiments/")) for name in named)


def test_every_symbol_that_a_step_names_is_in_the_file_beside_it():
    """`RULES` there, `SCHEDULES` in FILE, `Corpus` of FILE."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    pairs = re.findall(r"`(\w+)`\s(?:in|of)\s`([\w/.]+\.py)`", text)
    assert len(pairs) >= 4
    assert not [pair for pair in pairs if pair[0] not in (ROOT / pair[1]).read_text()]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == moe_jax.__version__
    assert {"title", "authors", "message", "license"} <= citation.keys()
    assert citation["title"].startswith("moe_jax")
