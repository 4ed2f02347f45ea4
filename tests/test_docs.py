"""README and docs: what they link to and name exists, and the site is built of every page."""

import re
from types import SimpleNamespace

import pytest
import yaml

from tests.support import ROOT

TOP = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md", "examples/vllm_serving/README.md"]
PAGES = [*TOP, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
# a path of this repository, as pages name it in text, in tables and in pictures
FOLDERS = "rl|rollout|drafter_trainer|paceline|launch|configs|examples|docs|tests|benchmarks|constraints"
NAMED = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*[\w/]")
# other projects' files, and what was here before
NOT_OURS = {"examples/bench_sd.sh", "examples/grpo_7B.sh", "rl/commands/"}


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def anchors_of(path):
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h).lower()) for h in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page):
    broken = []
    for target in LINK.findall(FENCE.sub("", text_of(page))):
        if re.match(r"[a-z]+:|\.\./\.\./actions/", target):  # another site, or GitHub's own pages
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        if not there.exists() or (anchor and anchor not in anchors_of(there)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    named = {match.rstrip(".") for match in NAMED.findall(text_of(page))}
    # an --out option names its files without their endings
    missing = {name for name in named if not (ROOT / name).exists() and not list(ROOT.glob(f"{name}.*"))}
    assert sorted(missing - NOT_OURS) == []


def test_the_site_has_every_page_once():
    class Loader(yaml.SafeLoader):
        """Reads mkdocs.yml, whose tags only MkDocs knows."""

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]
    pages = re.findall(r"[\w/.-]+\.md", str(nav))
    there = sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))
    assert sorted(pages) == there


def test_the_readme_fits_two_screens():
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 100
    screen = "\n".join(lines[:30])
    for answer in (
        "What it is",
        "Why believe it",
        "paceline train tiny",
        "paceline_rollouts()",
        "rl/trainer.py",
    ):
        assert answer in screen


def test_the_hook_leads_out_of_the_site_to_the_repository():
    hooks = {}
    exec((ROOT / "docs" / "hooks.py").read_text(), hooks)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="design/decisions.md"))
    text = "[a](../index.md#x) [b](../../rl/trainer.py) ![c](../assets/c.png) [d](https://e.f/g)"
    known, unknown = SimpleNamespace(repo_url="https://r"), SimpleNamespace(repo_url="")
    rewritten = hooks["on_page_markdown"](text, page=page, config=known, files=None)
    assert rewritten == text.replace("../../rl/trainer.py", "https://r/blob/main/rl/trainer.py")
    assert "b ![c]" in hooks["on_page_markdown"](text, page=page, config=unknown, files=None)


def test_what_the_changelog_maps_old_imports_to_exists():
    """Dotted paths in the second column of its table, and the names after a colon."""
    table = text_of("CHANGELOG.md").partition("| 0.2.0 | now |")[2].partition("\n\n")[0]
    broken = []
    for row in table.splitlines()[2:]:
        new = row.strip("| ").split(" | ")[1]
        for prefix, names in re.findall(r"`(paceline[.\w]*)`(?:: ((?:`\w+`(?:, )?)+))?", new):
            paths = [f"{prefix}.{name}" for name in re.findall(r"\w+", names)] or [prefix]
            broken += [path for path in paths if not is_module(path)]
    assert broken == []


def is_module(dotted):
    path = ROOT / dotted.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()
