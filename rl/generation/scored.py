"""Generates a step's completions and scores each as soon as it finishes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from paceline.rl.algorithms.advantages import uniform_groups
from paceline.rl.config.run import RunConfig
from paceline.rl.generation.anytime import Anytime, AnytimeCredit
from paceline.rl.generation.progress import RolloutProgress
from paceline.rl.generation.worker import RolloutWorker
from paceline.rl.process.progress import Phase
from paceline.rl.rewards.pool import Scores, ScoringPool
from paceline.rl.tasks.prompts import scored_text
from paceline.rl.tasks.sampler import PromptSampler
from paceline.rl.tasks.task import Problem
from paceline.rl.types import RankRollouts
from paceline.rollout import FinishReason, Rollout, StepRecord

_RESAMPLE_SEED_OFFSET = (
    10**9
)  # above the steps of any run: seeds of resampling rounds are seeds of no later step

PhaseTimer = Callable[[str], AbstractContextManager[Phase]]


class ScoringFailed(Exception):
    """No completion of a step has a reward; the message says why."""


@dataclass(slots=True)
class ScoredRollouts:
    """A rank's completions of a step with their rewards.

    Attributes:
        batch: The completions.
        scores: What the scoring pool returned for them.
        rewards: The reward of each completion.
    """

    batch: RankRollouts
    scores: Scores
    rewards: list[float]


class ScoredGenerator:
    """Asks a step's problems on one rank and scores completions while others are still decoded.

    Args:
        config: The recipe.
        worker: The rank's engine.
        pool: The processes that score.
        sampler: Chooses problems.
        tokenizer: The policy's tokenizer.
        accelerator: The run's accelerator.
        log: Receives lines for the user.
        heartbeat: Called with the record of each decode step.
    """

    def __init__(
        self,
        config: RunConfig,
        worker: RolloutWorker,
        pool: ScoringPool,
        sampler: PromptSampler,
        tokenizer: Any,
        accelerator: Accelerator,
        log: Callable[[str], None],
        heartbeat: Callable[[StepRecord], None],
    ) -> None:
        self._config, self._worker, self._pool, self._sampler = config, worker, pool, sampler
        self._tokenizer, self._accelerator, self._log, self._heartbeat = (
            tokenizer,
            accelerator,
            log,
            heartbeat,
        )
        self._notices: set[str] = set()
        self._unreported: list[Scores] = []

    def generate(self, step: int, phase: PhaseTimer) -> ScoredRollouts:
        """Returns this rank's completions with their rewards.

        Groups whose rewards are all equal teach nothing: with ``rollout.resample``, as many others are
        generated beside them.

        Args:
            step: Index of the step.
            phase: Times a phase of the step and shows it to the user.
        """
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        size, rounds = self._config.rollout.group_size, self._config.rollout.resample
        problems = self._sampler.choose(step, self._config.rollout.prompts_per_step)[rank::ranks]
        scored = self._round(problems, step, 0, phase)
        for number in range(1, rounds + 1):
            extra = len(scored.batch.problems) // size - len(problems)
            missing = len(uniform_groups(scored.rewards, size)) - extra
            if missing <= 0:
                break
            others = self._sampler.more(step, missing, number, rank)
            more = self._round(others, step, number * ranks + rank, phase)  # ranks may draw the same problem
            scored.batch, scored.rewards = scored.batch.joined(more.batch), [*scored.rewards, *more.rewards]
            scored.scores.note(more.scores)
        self._unreported.append(scored.scores)
        return scored

    def demand_answers(
        self, anytime: Anytime, scored: ScoredRollouts, step: int, phase: PhaseTimer
    ) -> AnytimeCredit:
        """Returns the answers that cut thoughts give, scored, and the advantages that follow from them."""
        batch = scored.batch
        with phase("rollout"):
            thoughts, cuts = anytime.demand(batch, step)
        with phase("score"):
            anytime.hand_over(batch, cuts, self.text, self._pool.add)
            answers = self._pool.collect()
        self._unreported.append(answers)
        failed = self._config.task.score_failed
        rewards = [answers.values.get(number, failed) for number in range(len(cuts))]
        return anytime.credit(batch, thoughts, scored.rewards, cuts, rewards)

    def report_failures(self, step: int) -> None:
        """Logs how many completions and answers of the step have no reward. Collective.

        Generating is not collective, so that a rank that has finished can train the drafter while others
        decode. Call this once every rank has finished.

        Raises:
            ScoringFailed: on every rank, when no completion or no answer of any rank has a reward.
        """
        unreported, self._unreported = self._unreported, []
        for scores in unreported:
            self._report(step, scores)

    def text(self, token_ids: Sequence[int]) -> str:
        """Returns the text of a completion as scorers read it."""
        stops = self._worker.params.stop_token_ids
        return scored_text(self._tokenizer, token_ids, self._config.task, stops)

    def _round(self, problems: list[Problem], step: int, number: int, phase: PhaseTimer) -> ScoredRollouts:
        with phase("rollout") as shown:
            progress = RolloutProgress(shown, len(problems) * self._config.rollout.group_size)

            def on_step(record: StepRecord) -> None:
                self._heartbeat(record)
                progress.on_step(record)

            def on_finish(index: int, problem: Problem, rollout: Rollout) -> None:
                progress.on_finish()
                if rollout.finish_reason is not FinishReason.FAILED:
                    self._pool.add(index, problem, self.text(rollout.token_ids), rollout.token_ids)

            seed_step = step + number * _RESAMPLE_SEED_OFFSET  # a problem may be drawn in two rounds
            batch = self._worker.rollout(problems, seed_step, on_step, on_finish)
        with phase("score"):
            scores = self._pool.collect()
        failed = self._config.task.score_failed
        return ScoredRollouts(batch, scores, [scores.values.get(place, failed) for place in batch.places])

    def _report(self, step: int, scores: Scores) -> None:
        """Logs how many completions have no reward. Collective.

        Raises:
            ScoringFailed: on every rank, when no completion of any rank has one.
        """
        asked, failed, problems, notices = zip(
            *gather_object([(scores.asked, scores.failed, scores.problem, scores.notice)]), strict=True
        )
        problem = next((p for p in problems if p is not None), None)
        notice = next((n for n in notices if n is not None), None)
        if notice is not None and notice not in self._notices:
            self._notices.add(notice)
            self._log(notice)
        if not sum(failed):
            return
        if sum(failed) == sum(asked):
            raise ScoringFailed(
                f"step {step + 1}: none of the {sum(asked)} completions has a reward: {problem}"
            )
        self._log(
            f"reward: {sum(failed)} of {sum(asked)} completions have no score ({problem}); "
            f"they get {self._config.task.score_failed:g}"
        )
