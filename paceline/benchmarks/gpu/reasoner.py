"""A small reasoner trained on the spot, with a drafter distilled from it: what speculation gains on a GPU.

The reasoner adds long sums aloud. It has 8 layers of width 512 and reads digits one by one, so that a minute
of training on one GPU is enough.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from paceline.benchmarks.common.results import Log
from paceline.benchmarks.gpu.shapes import decode_anew
from paceline.drafter_trainer.initialization import initial_drafter
from paceline.drafter_trainer.learner import DrafterLearner
from paceline.drafter_trainer.objective.draft_objective import Objective
from paceline.drafter_trainer.spot_trainer import SpotTrainer
from paceline.drafter_trainer.trace_buffer import TraceBuffer
from paceline.rollout import (
    Request,
    Rollout,
    RolloutEngine,
    SamplingParams,
    default_tap_layers,
    mean_acceptance_length,
)
from paceline.rollout.drafters import Eagle3Drafter, SuffixDrafter
from paceline.rollout.drafters.eagle3 import fixed_taps
from paceline.rollout.drafters.eagle3_model import Eagle3Model, eagle3_config

_TEXT = "0123456789+=;"
_END, _PAD = len(_TEXT), len(_TEXT) + 1
_VOCABULARY = 64
_TERMS = (8, 48)  # of a sum; its completion names every partial sum
_LENGTH = 288  # tokens that a training text is cut to
_BATCH = 64
_CONTEXT = 512  # tokens before a piece that the drafter is trained with
_BANDIT_SECONDS = 3  # of decoding, in which the bandit has tried every strategy
_STRATEGIES = ("plain", "eagle3:3", "adaptive")
_ROUNDS = 4  # in which all strategies take turns, because the host's speed changes from second to second


@dataclass(slots=True)
class ReasonerReport:
    """Holds what speculation gains on the small reasoner, at temperature 1.

    Attributes:
        policy_loss: Loss of the reasoner after training, in nats.
        right: Share of completions that end with the right sum.
        training_seconds: Seconds of training the reasoner and its drafter.
        acceptance_length: Acceptance length with chains of four draft tokens.
        speeds: Tuples of batch size, strategy, and its tokens per second, prefill and drafting included, in
            each of the rounds in which all strategies take turns.
        same_tokens: Whether plain and speculative decoding gave the same tokens, batch by batch, as shares of
            the completions; rounding differs with the number of rows.
    """

    policy_loss: float
    right: float
    training_seconds: tuple[float, float]
    acceptance_length: float
    speeds: list[tuple[int, str, list[float]]]
    same_tokens: list[tuple[int, float]]


def problem(generator: random.Random, terms: int) -> tuple[str, str]:
    """Returns a sum of digits and what the reasoner should say: every partial sum, then the end."""
    digits = [generator.randint(1, 9) for _ in range(terms)]
    partial = [sum(digits[: i + 1]) for i in range(terms)]
    return "+".join(map(str, digits)) + "=", ";".join(map(str, partial))


def _ids(text: str) -> list[int]:
    return [_TEXT.index(c) for c in text]


def train_reasoner(seconds: float, device: str) -> tuple[PreTrainedModel, float]:
    """Trains the reasoner for about ``seconds``; returns it in bfloat16 and its last loss."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=_END,
        pad_token_id=_PAD,
    )
    model = AutoModelForCausalLM.from_config(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    generator, begin, loss = random.Random(0), time.perf_counter(), torch.tensor(0.0)
    while (spent := (time.perf_counter() - begin) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(20 * spent, 1.0, 1.05 - spent)
        texts, labels = _training_batch(generator)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=texts.to(device), labels=labels.to(device)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.to(torch.bfloat16).eval().requires_grad_(False), float(loss.detach())


def _training_batch(generator: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns texts and labels int64 [64, 288]; labels cover the completions only."""
    texts = torch.full((_BATCH, _LENGTH), _PAD)
    labels = torch.full((_BATCH, _LENGTH), -100)
    for row in range(_BATCH):
        asked, said = problem(generator, generator.randint(*_TERMS))
        text = [*_ids(asked), *_ids(said), _END][:_LENGTH]
        texts[row, : len(text)] = torch.tensor(text)
        labels[row, len(asked) : len(text)] = texts[row, len(asked) : len(text)]
    return texts, labels


def _requests(count: int, seed: int) -> list[tuple[Request, str]]:
    """Returns requests of the longest sums, with the right answers."""
    generator, requests = random.Random(seed), []
    for i in range(count):
        asked, said = problem(generator, generator.randint(_TERMS[1] * 3 // 4, _TERMS[1]))
        params = SamplingParams(temperature=1.0, max_tokens=256, stop_token_ids=(_END,))
        requests.append((Request(_ids(asked), params, seed=seed + i, group=i), said.rpartition(";")[2]))
    return requests


def _is_right(rollout: Rollout, answer: str) -> bool:
    said = "".join(_TEXT[t] if t < len(_TEXT) else " " for t in rollout.token_ids)
    return said.strip().rpartition(";")[2] == answer


def measure_reasoner(seconds: float, log: Log, device: str = "cuda") -> ReasonerReport:
    """Trains the reasoner and a drafter for ``seconds`` each, then measures decoding.

    Args:
        seconds: Seconds of training the reasoner, and again of sampling for and training the drafter.
        log: Receives a line per stage.
        device: Device to train and decode on.
    """
    model, loss = train_reasoner(seconds, device)
    log(f"reasoner: loss {loss:.3f} after {seconds:.0f} s")
    engine = _engine(model, slots=64)
    begin = time.perf_counter()
    drafter = _distil(model, engine, seconds, device)
    training = time.perf_counter() - begin
    engine.add_drafter(SuffixDrafter())
    engine.add_drafter(_drafting(engine, drafter, slots=64))
    engine.collect_traces = False
    right = _requests(64, seed=1000)
    engine.use_strategy("eagle3:4")
    rollouts = engine.generate([request for request, _ in right])
    report = ReasonerReport(
        loss,
        sum(_is_right(r, answer) for r, (_, answer) in zip(rollouts, right, strict=True)) / len(right),
        (seconds, training),
        mean_acceptance_length(rollouts),
        [],
        [],
    )
    log(f"reasoner: {report.right:.0%} right, acceptance length {report.acceptance_length:.2f}")
    for batch in (1, 8, 64):
        requests, warm = ([request for request, _ in _requests(batch, seed)] for seed in (2000, 3000))
        found = _speeds(engine, requests, warm)
        report.speeds += [(batch, strategy, rounds) for strategy, rounds in found.items()]
        texts = []
        for strategy in ("plain", "eagle3:3"):
            engine.use_strategy(strategy)
            texts.append([r.token_ids for r in engine.generate(requests)])
        report.same_tokens.append((batch, sum(a == b for a, b in zip(*texts, strict=True)) / batch))
        plain, chain, adaptive = (mean(found[strategy]) for strategy in _STRATEGIES)
        log(
            f"reasoner: batch {batch}: plain {plain:.0f} tokens/s, chains of three {chain / plain:.2f} x, "
            f"adaptive {adaptive / plain:.2f} x, same texts {report.same_tokens[-1][1]:.0%}"
        )
    return report


def _speeds(
    engine: RolloutEngine, requests: Sequence[Request], warm: Sequence[Request]
) -> dict[str, list[float]]:
    """Returns the tokens per second of each strategy, round by round, after a warm-up on other requests."""
    selectors = {}
    for strategy in _STRATEGIES:
        engine.use_strategy(strategy)
        selectors[strategy] = engine.speculation.selector
        begin = time.perf_counter()
        decode_anew(engine, warm)
        while strategy == "adaptive" and time.perf_counter() - begin < _BANDIT_SECONDS:
            decode_anew(engine, warm)
    found: dict[str, list[float]] = {strategy: [] for strategy in _STRATEGIES}
    for _ in range(_ROUNDS):
        for strategy, selector in selectors.items():
            engine.speculation.selector = selector
            found[strategy].append(decode_anew(engine, requests))
    return found


def _engine(model: PreTrainedModel, slots: int) -> RolloutEngine:
    taps = default_tap_layers(model.config.num_hidden_layers)
    return RolloutEngine(
        model, max_slots=slots, max_context=512, tap_layers=taps, collect_traces=True, kv_memory_bytes=4 << 30
    )


def _drafting(engine: RolloutEngine, model: Eagle3Model, slots: int) -> Eagle3Drafter:
    return Eagle3Drafter(
        model,
        engine.runner.view.module.get_input_embeddings(),
        slots=slots,
        capacity=engine.capacity_for(512, engine.max_nodes),
        dtype=torch.bfloat16,
        taps=fixed_taps(engine.runner),
    )


def _distil(model: PreTrainedModel, engine: RolloutEngine, seconds: float, device: str) -> Eagle3Model:
    """Samples from the reasoner and distils a drafter, in turn, for about ``seconds``."""
    vocabulary = torch.arange(_VOCABULARY)
    config = eagle3_config(model.config, _VOCABULARY, engine.runner.tap_layers)
    weights = initial_drafter(config, vocabulary, model, seed=0).to(device)
    learner = DrafterLearner(
        weights,
        model.get_input_embeddings(),
        model.get_output_embeddings(),
        Objective(),
        lr=1e-3,
        temperature=1.0,
        autocast=lambda: torch.autocast(device, dtype=torch.bfloat16),
        context=_CONTEXT,
    )
    buffer = TraceBuffer(passes=4)
    spot = SpotTrainer([learner], buffer, budget=4096)
    begin, seed = time.perf_counter(), 0

    def over() -> bool:
        return time.perf_counter() - begin >= seconds

    while not over():
        seed += 10_000
        buffer.begin_step()
        buffer.add(engine.generate([request for request, _ in _requests(64, seed)]))
        spot.run(over)
    return learner.model
