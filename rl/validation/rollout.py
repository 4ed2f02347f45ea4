"""Rules for the ``rollout`` section."""

from __future__ import annotations

import math
import re

from paceline.rl.config.run import RunConfig
from paceline.rl.validation.rules import Rule, above_zero, at_least


def sampling_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for lengths, sampling parameters and memory."""
    r = config.rollout
    return [
        *at_least(1, {"rollout.max_tokens": r.max_tokens}),
        (
            r.max_tokens < r.max_context,
            f"rollout.max_context is {r.max_context}, which must exceed rollout.max_tokens, {r.max_tokens}: "
            "write more, because the prompt counts too",
        ),
        (
            0 < r.temperature < math.inf,
            f"rollout.temperature is {r.temperature}: write a number above 0, because RL needs samples",
        ),
        (0 < r.top_p <= 1, f"rollout.top_p is {r.top_p}: write a number in (0, 1]"),
        *above_zero({"rollout.kv_memory_gb": r.kv_memory_gb}),
    ]


def match_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for what `rollout.match_trainer` needs."""
    r, scale = config.rollout, config.scale
    needs = (
        (r.dtype == "bfloat16", "the engine computes in float32", "rollout.dtype: bfloat16"),
        (
            config.policy.mixed_precision == "bf16",
            "the trainer computes in float32",
            "policy.mixed_precision: bf16",
        ),
        (r.vllm is None, "vLLM computes the rollouts", "rollout.vllm: null"),
        (not scale.sharded, "the policy is sharded", "scale.deepspeed: null and scale.fsdp2: false"),
        (scale.lora is None, "adapters are trained beside the policy", "scale.lora: null"),
    )
    return [
        (
            not r.match_trainer or met,
            f"rollout.match_trainer asks for the engine's arithmetic in training, but {reason}: write {fix}",
        )
        for met, reason, fix in needs
    ]


def group_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for groups, resampling and segments."""
    r, u = config.rollout, config.update
    return [
        (
            r.group_size >= 2,
            f"rollout.group_size is {r.group_size}, but advantages compare at least 2 samples of each "
            "prompt: write at least 2",
        ),
        (r.resample >= 0, f"rollout.resample is {r.resample}: write a number of at least 0"),
        (
            r.resample == 0 or u.advantage in ("group", "rloo"),
            f"rollout.resample replaces groups with equal rewards, but update.advantage is {u.advantage}: "
            "write update.advantage: group or rloo, or rollout.resample: 0",
        ),
        *at_least(1, {"rollout.segment_tokens": r.segment_tokens}, ", or null"),
        (
            r.segment_tokens is None or r.resample == 0,
            "rollout.resample and rollout.segment_tokens cannot be combined, because resampling needs "
            "finished groups and segments leave some unfinished: write rollout.resample: 0 or "
            "rollout.segment_tokens: null",
        ),
        (
            r.segment_tokens is None or config.measure.plain_every == 0,
            "measure.plain_every decodes whole completions again, which rollout.segment_tokens cuts: write "
            "measure.plain_every: 0",
        ),
    ]


def tree_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for samples that share prefixes."""
    r, tree, advantage = config.rollout, config.rollout.tree, config.update.advantage
    if tree is None:
        return [
            (
                advantage != "tree",
                "update.advantage: tree requires samples with shared prefixes: write rollout.tree",
            )
        ]
    return [
        (
            tree.segment_tokens >= 1 and tree.width >= 2 and 1 <= tree.roots <= r.group_size,
            "rollout.tree: write segment_tokens of at least 1, width of at least 2, and roots from 1 to "
            f"rollout.group_size, {r.group_size}",
        ),
        (
            r.segment_tokens is None,
            "rollout.tree and rollout.segment_tokens cannot be combined, because a tree finishes its group "
            "in one step: write rollout.segment_tokens: null",
        ),
        (
            config.measure.plain_every == 0,
            "measure.plain_every decodes samples independently, but rollout.tree shares prefixes: write "
            "measure.plain_every: 0",
        ),
        (
            not config.length.budgets or config.length.budget_of == "prompt",
            "rollout.tree shares prompts within a group, but length.budget_of: subgroup gives them different "
            "budgets: write length.budget_of: prompt",
        ),
        (
            advantage not in ("gae", "reinforce_pp"),
            f"rollout.tree makes groups, which update.advantage {advantage} does not use: write "
            "update.advantage: tree, group or rloo",
        ),
    ]


def vllm_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for rollouts by vLLM."""
    if config.rollout.vllm is None:
        return []
    return [*_vllm_features(config), *_vllm_servers(config), *_vllm_drafting(config)]


def _vllm_features(config: RunConfig) -> list[Rule]:
    """Returns rules against features that only the engine has."""
    r, length = config.rollout, config.length
    adapts = config.speculation.strategy == "adaptive"
    unsupported = [f"rollout.{name}" for name in ("segment_tokens", "tree") if getattr(r, name) is not None]
    return [
        (
            not unsupported,
            f"rollout.vllm decodes whole, independent completions: leave {', '.join(unsupported)} out, or "
            "write rollout.vllm: null",
        ),
        (
            length.predictor == "observed",
            "length.predictor orders the engine's admissions, but rollout.vllm has its own scheduler: write "
            "length.predictor: observed",
        ),
        (
            not any(entry.get("name") == "pear" for entry in length.rewards),
            "length.rewards has pear, which needs entropies that vLLM does not return: leave it out, or "
            "write rollout.vllm: null",
        ),
        (
            length.anytime is None,
            "length.anytime truncates thoughts in the engine, which rollout.vllm replaces: write "
            "length.anytime: null or rollout.vllm: null",
        ),
        (
            config.measure.plain_every == 0 or (adapts and bool(config.speculation.drafters)),
            "measure.plain_every compares vLLM's adaptive drafts with none: write speculation.strategy: "
            "adaptive and speculation.drafters: [eagle3], or measure.plain_every: 0",
        ),
    ]


def _vllm_servers(config: RunConfig) -> list[Rule]:
    """Returns rules for the connection to servers and the depth of drafts."""
    vllm = config.rollout.vllm
    assert vllm is not None
    return [
        (
            not vllm.servers or vllm.exchange is not None,
            "rollout.vllm.servers read new weights from a shared directory: write it in "
            "rollout.vllm.exchange, and start the servers with paceline serve RUN --exchange DIRECTORY",
        ),
        *at_least(1, {"rollout.vllm.depth": vllm.depth}),
    ]


def _vllm_drafting(config: RunConfig) -> list[Rule]:
    """Returns rules for what vLLM can draft with."""
    s, drafter = config.speculation, config.drafter
    return [
        (
            set(s.drafters) <= {"eagle3"},
            f"speculation.drafters is {list(s.drafters)}, but rollout.vllm drafts with EAGLE-3 or not at "
            "all: write [eagle3] or []",
        ),
        (
            "eagle3" not in s.drafters or drafter.start is not None,
            "rollout.vllm loads its drafter at the start: name one in drafter.start "
            "(launch/warmup_drafter.py makes it), or write speculation.drafters: []",
        ),
        (
            drafter.vocabulary_every == 0,
            "drafter.vocabulary_every changes the drafter's shape, which rollout.vllm cannot reload: write "
            "drafter.vocabulary_every: 0",
        ),
        (
            re.fullmatch(r"adaptive|plain|eagle3:\d+", s.strategy) is not None,
            f"speculation.strategy is {s.strategy}, but rollout.vllm knows adaptive, plain and "
            "eagle3:<depth>: write one of these",
        ),
    ]
