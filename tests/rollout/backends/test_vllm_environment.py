"""What the environment variable adds to vLLM's arguments, and that it overrides nothing; vLLM is played by a
namespace.
"""

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from paceline.rollout.backends import vllm_environment
from paceline.rollout.backends.adaptive.vllm_options import ADAPTIVE_SCHEDULER, STATUS_VARIABLE, VARIABLE
from paceline.rollout.backends.vllm_environment import configure, install
from paceline.rollout.backends.vllm_transfer import register

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
PROPOSER = {"model": "paceline.rollout.backends.vllm_suffix.GroupSuffixProposer", "num_speculative_tokens": 3}
LISTING = [[1, 1, 0], [2, 2, 1], [3, 3, 2], [4, 100_000, 3]]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv(STATUS_VARIABLE, "inherited")
    monkeypatch.setattr(vllm_environment, "_register_collector", lambda: None)
    play_vllm(monkeypatch, "0.32.1+cpu")


def play_vllm(monkeypatch, version):
    module = ModuleType("vllm")
    module.__version__ = version
    monkeypatch.setitem(sys.modules, "vllm", module)


def arguments(**given):
    """vLLM's arguments with their defaults."""
    defaults = {
        "speculative_config": None,
        "scheduler_cls": None,
        "spec_method": None,
        "spec_model": None,
        "spec_tokens": None,
        "enable_sleep_mode": False,
        "sleep_preserve_parameter_names": [],
    }
    return SimpleNamespace(**defaults | given)


def configured(monkeypatch, options, **given):
    if options is not None:
        monkeypatch.setenv(VARIABLE, json.dumps(options))
    else:
        monkeypatch.delenv(VARIABLE, raising=False)
    changed = arguments(**given)
    configure(changed)
    return changed


def test_a_program_without_options_gets_drafts_their_depths_and_the_scheduler(monkeypatch):
    changed = configured(monkeypatch, {"speculative": NGRAM}, enable_sleep_mode=True)
    assert changed.speculative_config == {**NGRAM, "num_speculative_tokens_per_batch_size": LISTING}
    assert changed.scheduler_cls == ADAPTIVE_SCHEDULER
    assert changed.sleep_preserve_parameter_names == ["draft.*"]


def test_a_proposers_class_is_enough(monkeypatch):
    """vLLM sees by its path that it is one."""
    changed = configured(monkeypatch, {"speculative": PROPOSER})
    assert changed.speculative_config == {**PROPOSER, "num_speculative_tokens_per_batch_size": LISTING}
    assert changed.scheduler_cls == ADAPTIVE_SCHEDULER


def test_what_the_program_says_stays(monkeypatch):
    own = {"method": "eagle3", "num-speculative-tokens": 2}
    given = {"scheduler_cls": "theirs.Scheduler", "sleep_preserve_parameter_names": ["x"]}
    changed = configured(
        monkeypatch, {"speculative": NGRAM}, speculative_config=own, enable_sleep_mode=True, **given
    )
    assert changed.speculative_config == {"method": "eagle3", "num-speculative-tokens": 2}
    assert changed.scheduler_cls == "theirs.Scheduler"
    assert changed.sleep_preserve_parameter_names == ["x"]
    listed = configured(monkeypatch, {}, speculative_config=own)
    assert listed.speculative_config["num_speculative_tokens_per_batch_size"][-1] == [3, 100_000, 2]
    scheduled = {**own, "num_speculative_tokens_per_batch_size": [[1, 8, 2]]}
    kept = configured(monkeypatch, {}, speculative_config=scheduled)
    assert kept.speculative_config == scheduled
    separate = configured(monkeypatch, {"speculative": NGRAM}, spec_method="eagle3", spec_tokens=1)
    assert separate.speculative_config == {
        "num_speculative_tokens_per_batch_size": [[1, 1, 0], [2, 100_000, 1]]
    }


def test_nothing_changes_without_the_variable_without_drafts_or_for_other_methods(monkeypatch):
    assert configured(monkeypatch, None) == arguments()
    assert configured(monkeypatch, {}, enable_sleep_mode=True) == arguments(enable_sleep_mode=True)
    suffix = {"method": "suffix", "num_speculative_tokens": 8}
    assert configured(monkeypatch, {"speculative": suffix}).scheduler_cls is None
    assert configured(monkeypatch, {"speculative": NGRAM, "adaptive": False}).scheduler_cls is None
    explicit = configured(monkeypatch, None, scheduler_cls=ADAPTIVE_SCHEDULER, speculative_config=NGRAM)
    assert explicit.speculative_config["num_speculative_tokens_per_batch_size"] == LISTING


def test_the_drafter_survives_sleep_where_the_program_names_the_scheduler(monkeypatch):
    own = {"scheduler_cls": ADAPTIVE_SCHEDULER, "speculative_config": NGRAM, "enable_sleep_mode": True}
    assert configured(monkeypatch, None, **own).sleep_preserve_parameter_names == ["draft.*"]
    chosen = configured(monkeypatch, None, **own, sleep_preserve_parameter_names=["x"])
    assert chosen.sleep_preserve_parameter_names == ["x"]
    theirs = configured(monkeypatch, None, speculative_config=NGRAM, enable_sleep_mode=True)
    assert theirs.sleep_preserve_parameter_names == []


@pytest.mark.parametrize("version", ["0.27.1", "0.33.0rc1", "1.32.0"])
@pytest.mark.parametrize(
    ("key", "options", "given"),
    [
        ("PACELINE_VLLM", {"speculative": NGRAM}, {}),
        ("scheduler_cls", None, {"scheduler_cls": ADAPTIVE_SCHEDULER}),
        ("speculative_config", None, {"speculative_config": PROPOSER}),
    ],
)
def test_another_vllm_is_refused_in_a_line_that_names_the_key(monkeypatch, version, key, options, given):
    """vLLM 0.27.1 started with the scheduler, and failed in its first undrafted step."""
    play_vllm(monkeypatch, version)
    with pytest.raises(RuntimeError) as refused:
        configured(monkeypatch, options, **given)
    wanted = f"{key} needs vLLM 0.32, and this is {version}: install vllm>=0.32,<0.33, or drop {key}"
    assert str(refused.value) == wanted


def test_another_vllm_that_asks_for_nothing_of_ours_stays_as_it_is(monkeypatch):
    """It loads the plug-in all the same; modules that it does not have would be errors here."""
    play_vllm(monkeypatch, "0.27.1")
    register()
    older = arguments(speculative_config=NGRAM, enable_sleep_mode=True)
    del older.sleep_preserve_parameter_names  # vLLM 0.27 has no such argument
    before = dict(vars(older))
    monkeypatch.delenv(VARIABLE, raising=False)
    configure(older)
    assert vars(older) == before


def test_every_process_that_starts_a_server_has_a_status_of_its_own(monkeypatch):
    configured(monkeypatch, {"speculative": NGRAM})  # the variable was inherited
    assert os.environ[STATUS_VARIABLE] != "inherited"
    assert not list(Path(os.environ[STATUS_VARIABLE]).iterdir())


def test_arguments_are_changed_where_they_become_a_configuration_and_errors_stop_it(monkeypatch):
    class EngineArgs(SimpleNamespace):
        def create_engine_config(self, context=None):
            return self.speculative_config, context

    module = ModuleType("vllm.engine.arg_utils")
    module.EngineArgs = EngineArgs
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", module)
    install()
    first = EngineArgs.create_engine_config
    install()
    assert EngineArgs.create_engine_config is first
    monkeypatch.setenv(VARIABLE, json.dumps({"speculative": NGRAM}))
    made, context = EngineArgs(**vars(arguments())).create_engine_config(context=7)
    assert made["method"] == "ngram" and context == 7
    monkeypatch.setenv(VARIABLE, '{"sate": "x"}')
    with pytest.raises(ValueError, match="the key 'sate' is unknown"):
        EngineArgs(**vars(arguments())).create_engine_config()
