"""The key reference: every key has a text, the page is up to date, and the types load no torch."""

import dataclasses
import subprocess
import sys

import pytest

from paceline.cli.recipe_reference import PAGE, Section, key_texts, page, sections


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "docs/recipes.md is stale: run python -m paceline.cli.recipe_reference"
    )


@pytest.mark.parametrize("section", list(sections()), ids=lambda section: section.path or "top")
def test_every_key_has_a_text(section):
    texts = key_texts(section.kind)
    assert list(texts) == [field.name for field in dataclasses.fields(section.kind)]
    for key, text in texts.items():
        assert text[0].isupper() or text[0] == "λ" or text.startswith("vLLM"), f"{section.path}.{key}: {text}"
        assert text.endswith("."), f"{section.path}.{key}: {text}"


def test_nested_sections_are_found():
    paths = {section.path: section.listed for section in sections()}
    assert not paths[""] and not paths["policy.warmup"] and not paths["rollout.vllm"]
    assert paths["task.datasets"] and paths["task.reward"]


def test_a_key_without_a_text_has_none():
    assert key_texts(Section) == {}  # its attributes are documented in the class's docstring


def test_types_of_the_recipe_load_no_torch():
    code = "import sys, paceline.rl.config.run, paceline.rl.config.parsing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
