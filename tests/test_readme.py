"""The Python examples of README and of the pages that teach by them run as they stand."""

import re
import runpy
from contextlib import ExitStack
from unittest.mock import patch

import pytest

from paceline.drafter_trainer.objective.losses import LOSSES
from paceline.rl.algorithms.advantages import ADVANTAGES
from paceline.rl.algorithms.policy_losses import POLICY_LOSSES
from paceline.rollout.trees import TREES
from paceline.rollout.verify import VERIFIERS
from tests.support import ROOT

PAGES = ["README.md", "docs/getting-started.md", "docs/development.md", "docs/rewards.md"]
BLOCKS = {
    f"{page}:{number}": block
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL), start=1
    )
}


@pytest.mark.parametrize("name", BLOCKS)
def test_example(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS[name].splitlines()) <= (15 if name.startswith("README") else 40)
    script = tmp_path / "example.py"
    script.write_text(BLOCKS[name])
    with ExitStack() as registries:  # examples add to them
        for registry in (LOSSES, ADVANTAGES, POLICY_LOSSES, TREES, VERIFIERS):
            registries.enter_context(patch.dict(registry))
        runpy.run_path(str(script))


def test_there_are_examples_for_engine_trainer_model_data_reward_and_drafter():
    assert len([name for name in BLOCKS if name.startswith("README")]) == 2  # TRL, and the engine alone
    assert len(BLOCKS) >= 6
    everything = "\n".join(BLOCKS.values())
    for shown in (
        "paceline_rollouts(",
        "fetch_policy(",
        "load_task(",
        "verifiable_reward(",
        "StatelessSlots",
    ):
        assert shown in everything
