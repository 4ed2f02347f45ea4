"""Which values of a recipe's drafting contradict each other, whoever trains."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from paceline.rl.config.run import RunConfig
from paceline.rl.config.speculation import SpeculationConfig
from paceline.rl.errors import UserError
from paceline.rollout import Strategy
from paceline.rollout.drafters import DRAFTERS, DraftRules
from paceline.rollout.drafters.coverage import refusal, stated_kind
from paceline.rollout.strategy import default_arms
from paceline.rollout.trees import MAX_NODES, DraftKind
from paceline.rollout.verify import VERIFIERS


def check_drafting(config: RunConfig) -> None:
    """Of the sections ``speculation`` and ``drafter``, and of how rollouts are sampled.

    Raises:
        UserError: for the first contradiction found.
    """
    r, d, s = config.rollout, config.drafter, config.speculation
    rules = [
        (r.max_tokens >= 1, f"rollout.max_tokens is {r.max_tokens}: write at least 1"),
        (
            r.max_tokens < r.max_context,
            "rollout.max_context must exceed rollout.max_tokens: the prompt needs room too",
        ),
        (
            0 < r.temperature < float("inf"),
            f"rollout.temperature is {r.temperature}: RL samples; write a number above 0",
        ),
        (0 < r.top_p <= 1, f"rollout.top_p is {r.top_p}: write a number in (0, 1]"),
        (1 <= s.max_nodes <= MAX_NODES, f"speculation.max_nodes is {s.max_nodes}: write 1 to {MAX_NODES}"),
        (0 <= s.epsilon < 1, f"speculation.epsilon is {s.epsilon}: write a number in [0, 1)"),
        (
            s.eagle3_window is None or s.eagle3_window >= 1,
            f"speculation.eagle3_window is {s.eagle3_window}: write at least 1, or null",
        ),
        (
            "draft_model" not in s.drafters or s.draft_model is not None,
            "speculation.drafters has draft_model: name the model in speculation.draft_model",
        ),
        (
            "composite" not in s.drafters or {"suffix", "eagle3"} <= set(s.drafters),
            "speculation.drafters has composite, which joins suffix and eagle3: list those too",
        ),
        (
            s.draw == "likeliest" or "composite" not in s.drafters,
            "speculation.drafters has composite, which joins drafts of likeliest tokens: leave it out, or "
            "write draw: likeliest",
        ),
        (
            len(d.ensemble) > 0 and all(multiple > 0 for multiple in d.ensemble),
            f"drafter.ensemble is {list(d.ensemble)}: write multiples of drafter.lr above 0, [1.0] for one "
            "drafter",
        ),
        (
            d.warmup_minutes is None or d.warmup_minutes > 0,
            f"drafter.warmup_minutes is {d.warmup_minutes}: write minutes above 0, or null",
        ),
        (d.unroll >= 1, f"drafter.unroll is {d.unroll}: write at least 1"),
        (
            d.mask_top is None or d.mask_top >= 1,
            f"drafter.mask_top is {d.mask_top}: write at least 1, or null",
        ),
        (
            d.loss != "length" or not (d.feedback_only or d.on_policy),
            "drafter.loss length is of whole drafts: drafter.feedback_only and on_policy weigh single "
            "positions; leave them out",
        ),
        (d.on_policy >= 0, f"drafter.on_policy is {d.on_policy}: write a number from 0"),
        (d.least_idle_ranks >= 1, f"drafter.least_idle_ranks is {d.least_idle_ranks}: write at least 1"),
        (
            d.tokens_per_microbatch >= 16 and d.passes >= 1 and d.judge_every >= 1,
            "drafter.tokens_per_microbatch must be at least 16, passes and judge_every at least 1",
        ),
        (
            d.held_out_every != 1,
            "drafter.held_out_every is 1: nothing would be left to train on; write 0, or at least 2",
        ),
        (
            0 <= d.previous_share < 1,
            f"drafter.previous_share is {d.previous_share}: write a number in [0, 1)",
        ),
        (0 < d.age_decay <= 1, f"drafter.age_decay is {d.age_decay}: write a number in (0, 1]"),
        (0 <= d.reward_weight <= 1, f"drafter.reward_weight is {d.reward_weight}: write a number in [0, 1]"),
    ]
    refuse([*rules, *vllm_rules(config)])
    for name in s.drafters:
        if name not in DRAFTERS:
            close = difflib.get_close_matches(name, DRAFTERS, n=1, cutoff=0.0)[0]
            raise UserError(f"speculation.drafters has {name!r}; did you mean {close}?")
    try:
        made = draft_rules(s)
        named = [
            Strategy.parse(text)
            for text in (s.arms if s.strategy in ("adaptive", "plain") else (*s.arms, s.strategy))
        ]
    except ValueError as error:
        raise UserError(f"speculation: {error}") from None
    _check_verifier(s, made, named)


def _check_verifier(s: SpeculationConfig, rules: DraftRules, named: Sequence[Strategy]) -> None:
    """That the verifier is needed, and covers what every drafter drafts for every strategy that may run.

    Raises:
        UserError: for the first strategy whose drafts it would change the distribution of.
    """
    if s.verifier is None:
        return
    adaptive = s.strategy == "adaptive" and not s.arms
    usual = [
        a
        for name in s.drafters
        for a in default_arms(name, s.max_nodes, getattr(DRAFTERS[name], "chains_only", False))
    ]
    may_run = [a for a in (usual if adaptive else named) if a.drafter in DRAFTERS]
    kinds = {stated_kind(DRAFTERS[a.drafter], a, rules) for a in may_run if a.drafter is not None}
    if kinds <= {DraftKind.FIXED} and s.draw == "likeliest":
        raise UserError(
            f"speculation.verifier is {s.verifier}, but likeliest drafts need none: write null, or another "
            "speculation.draw"
        )
    for arm in may_run:
        problem = (
            None if arm.drafter is None else refusal(VERIFIERS[s.verifier], DRAFTERS[arm.drafter], arm, rules)
        )
        if problem is not None:
            where = (
                f"speculation.arms (empty stands for {arm} too)"
                if adaptive
                else f"speculation, strategy {arm}"
            )
            raise UserError(f"{where}: {problem}")


def vllm_rules(config: RunConfig) -> list[tuple[bool, str]]:
    """Of rollouts by vLLM."""
    r, s, length = config.rollout, config.speculation, config.length
    if r.vllm is None:
        return []
    drafts = "eagle3" in s.drafters
    asks = [f"rollout.{name}" for name in ("segment_tokens", "tree") if getattr(r, name) is not None]
    return [
        (
            not asks,
            f"rollout.vllm decodes whole completions: leave {', '.join(asks)} out, or decode with the engine",
        ),
        (
            length.predictor == "observed",
            "length.predictor orders the engine's admission, rollout.vllm has its own: write observed",
        ),
        (
            not any(entry.get("name") == "pear" for entry in length.rewards),
            "length.rewards has pear, whose entropies vLLM does not give: decode with the engine",
        ),
        (
            length.anytime is None,
            "length.anytime demands answers of cut thoughts from the engine: decode with it",
        ),
        (
            config.measure.plain_every == 0,
            "measure.plain_every decodes again with the engine: write 0 with rollout.vllm",
        ),
        (
            not r.vllm.servers or r.vllm.exchange is not None,
            "rollout.vllm.servers read new weights from one directory: write it in rollout.vllm.exchange, "
            "and start them with "
            "paceline serve RUN --exchange DIRECTORY",
        ),
        (r.vllm.depth >= 1, f"rollout.vllm.depth is {r.vllm.depth}: write at least 1"),
        (
            set(s.drafters) <= {"eagle3"},
            "rollout.vllm drafts with EAGLE-3 or not at all: write speculation.drafters: [eagle3], or []",
        ),
        (
            not drafts or config.drafter.start is not None,
            "rollout.vllm takes a drafter at its start: name one in drafter.start (launch/warmup_drafter.py "
            "makes it), "
            "or write speculation.drafters: []",
        ),
        (
            config.drafter.vocabulary_every == 0,
            "drafter.vocabulary_every changes what vLLM has loaded: write 0 with rollout.vllm",
        ),
        (
            re.fullmatch(r"adaptive|plain|eagle3:\d+", s.strategy) is not None,
            f"speculation.strategy is {s.strategy}: rollout.vllm knows adaptive, plain and eagle3:<depth>",
        ),
    ]


def refuse(rules: list[tuple[bool, str]]) -> None:
    """The first rule that does not hold, as a `UserError`."""
    for holds, message in rules:
        if not holds:
            raise UserError(message)


def draft_rules(s: SpeculationConfig) -> DraftRules:
    """How model-based drafters make their drafts.

    Raises:
        ValueError: for choices that do not fit each other.
    """
    return DraftRules(s.tree, s.draw, s.stop, s.stop_threshold, s.tree_gain)
