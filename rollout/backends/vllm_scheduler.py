"""vLLM's scheduler with a depth of drafts that is chosen for each step from measured times.

``--scheduler-cls paceline.rollout.backends.vllm_scheduler.AdaptiveScheduler``, with synchronous and
asynchronous scheduling. It was written for vLLM 0.32.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from vllm import __version__ as vllm_version
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from paceline.rollout.backends.adaptive.control_files import ControlFiles
from paceline.rollout.backends.adaptive.depth_control import DepthControl, StepShape
from paceline.rollout.backends.adaptive.draft_schedule import listing_schedule
from paceline.rollout.backends.adaptive.undrafted_steps import defer_drafting, sample_plainly
from paceline.rollout.backends.adaptive.vllm_options import (
    ADAPTIVE_METHODS,
    STATUS_VARIABLE,
    VllmOptions,
    options_from_environment,
)
from paceline.rollout.backends.vllm_plain import is_plain
from paceline.rollout.trees.draft_tree import MAX_NODES

logger = init_logger("vllm.paceline")

_VARYING_METHODS = ("ngram", "custom_class")  # may draft fewer tokens than asked for


class AdaptiveScheduler(Scheduler):
    """Chooses how many tokens each step drafts; everything else is vLLM's scheduler.

    Steps with a request that asks for plain decoding (`paceline.rollout.backends.vllm_plain`) draft nothing.

    The depths to choose from are those of the speculative config's ``num_speculative_tokens_per_batch_size``,
    and 0. Without such a schedule, or with a method that cannot draft less than its maximum, a warning says
    so and the depth stays as configured.

    With asynchronous scheduling an instance is an `AdaptiveAsyncScheduler`.

    Args:
        vllm_config: vLLM's configuration.
        arguments: The other arguments of vLLM's scheduler.

    Attributes:
        control: Chooses the depths; None if the depth is fixed.
    """

    def __new__(cls, vllm_config: Any, **arguments: Any) -> AdaptiveScheduler:
        """Returns an instance for the kind of scheduling that is configured."""
        asynchronous = cls is AdaptiveScheduler and vllm_config.scheduler_config.async_scheduling
        return super().__new__(AdaptiveAsyncScheduler if asynchronous else cls)

    def __init__(self, vllm_config: Any, **arguments: Any) -> None:
        super().__init__(vllm_config=vllm_config, **arguments)
        options = options_from_environment() or VllmOptions()
        self._drafting = self.num_spec_tokens
        self.control = self._make_control(options)
        self._files: ControlFiles | None = None
        if self.control is not None:
            if current_platform.is_cpu():  # the worker is in this process unless there are several
                defer_drafting(SpecDecodeBaseProposer, lambda line: logger.warning("paceline: %s", line))
                sample_plainly(GPUModelRunner)
            self._files = self._make_files(self.control, options)
            self._files.restore()

    def _make_control(self, options: VllmOptions) -> DepthControl | None:
        """Returns the control of what vLLM was configured with; None if the depth is fixed."""
        speculative = self.vllm_config.speculative_config
        given = None if speculative is None else speculative.num_speculative_tokens_per_batch_size
        schedule = [list(entry) for entry in given or ()]
        depths = sorted({min(depth, self.num_spec_tokens) for _, _, depth in schedule})
        if depths and schedule == listing_schedule(depths):
            # that schedule only names the depths; where there is no choice, all steps draft the most
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)
        reason = None
        if speculative is None:
            reason = "nothing is drafted"
        elif speculative.method not in ADAPTIVE_METHODS:
            reason = f"the method {speculative.method} drafts its maximum only"
        elif not schedule:
            reason = "there is no num_speculative_tokens_per_batch_size, or data parallelism has removed it"
        elif not any(depths):
            reason = "the schedule drafts nothing"
        elif _scheduled_by_each_rank(self.vllm_config.parallel_config):
            reason = "each rank schedules for itself (external_launcher), and their times differ"
        if reason is not None:
            logger.warning("paceline: the draft depth is not adapted: %s", reason)
            return None
        return DepthControl(
            speculative.method,
            [min(depth, MAX_NODES) for depth in depths],
            varies=speculative.method in _VARYING_METHODS,
            seed=self.vllm_config.model_config.seed or 0,
            say=lambda line: logger.warning("paceline: %s", line),
            probe_seconds=options.probe_seconds,
        )

    def _make_files(self, control: DepthControl, options: VllmOptions) -> ControlFiles:
        identity = {
            "model": str(self.vllm_config.model_config.model),
            "drafter": str(self.vllm_config.speculative_config.model),
            "vllm": vllm_version,
        }
        status = os.environ.get(STATUS_VARIABLE)
        return ControlFiles(control, options.state, None if status is None else Path(status), identity)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Sets the depth of the step's drafts before vLLM makes room for them."""
        control = self.control
        if control is not None and self._any_plain(scheduler_output):
            control.interrupted()
            scheduler_output.num_spec_tokens_to_schedule = self._drafting = 0
        elif control is not None:
            scheduler_output.num_spec_tokens_to_schedule = self._drafting = control.guard(
                lambda: control.scheduled(
                    id(scheduler_output), self._shape(scheduler_output), time.perf_counter()
                ),
                otherwise=scheduler_output.num_spec_tokens_to_schedule,
            )
        super()._update_after_schedule(scheduler_output)

    def _any_plain(self, step: SchedulerOutput) -> bool:
        """Returns whether a request of the step is to be decoded without drafts; nothing is learned then."""
        return any(is_plain(self.requests[name].sampling_params) for name in step.num_scheduled_tokens)

    def _shape(self, step: SchedulerOutput) -> StepShape:
        context = max(
            (self.requests[name].num_computed_tokens + n for name, n in step.num_scheduled_tokens.items()),
            default=0,
        )
        drafted = [len(step.scheduled_spec_decode_tokens.get(name, ())) for name in _decoding(step)]
        draft_model = self.vllm_config.speculative_config.draft_model_config
        longest = min(self.max_model_len, getattr(draft_model, "max_model_len", None) or self.max_model_len)
        return StepShape(
            sequences=len(step.num_scheduled_tokens),
            drafted=drafted,
            context=context,
            prompt_tokens=step.total_num_scheduled_tokens - len(drafted) - sum(drafted),
            fits=context + self.num_spec_tokens <= longest,
        )

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """Learns from the step, and processes its output as vLLM does."""
        control, now = self.control, time.perf_counter()
        if control is None:
            return super().update_from_output(scheduler_output, model_runner_output)
        # counted first, because vLLM cuts the lists at stop tokens
        none: list[int] = []
        committed = control.guard(lambda: _committed(scheduler_output, model_runner_output), otherwise=none)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        control.guard(lambda: self._learn(control, id(scheduler_output), committed, now), otherwise=None)
        return outputs

    def _learn(self, control: DepthControl, key: int, committed: list[int], now: float) -> None:
        busy = bool(self.running)
        control.finished(key, committed, now, busy)
        if self._files is not None:
            self._files.update(now, busy)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Cuts drafts to the chosen depth, which not every proposer keeps to, and hands them to vLLM."""
        if self.control is not None:
            drafts = draft_token_ids.draft_token_ids
            drafts[:] = [tokens[: self._drafting] for tokens in drafts]
        super().update_draft_token_ids(draft_token_ids)

    def set_pause_state(self, pause_state: PauseState) -> None:
        """Pauses or resumes; whoever pauses may put the engine to sleep or change weights meanwhile."""
        super().set_pause_state(pause_state)
        self._weights_may_have_changed()

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Resets the prefix cache, which whoever changes weights does."""
        done = super().reset_prefix_cache(reset_running_requests, reset_connector)
        self._weights_may_have_changed()
        return done

    def _weights_may_have_changed(self) -> None:
        if self.control is not None:
            self.control.guard(self.control.policy_changed, otherwise=None)

    def shutdown(self) -> None:
        """Saves what was learned, and shuts vLLM's scheduler down."""
        super().shutdown()
        if self._files is not None and self.control is not None:
            self.control.guard(self._files.close, otherwise=None)


class AdaptiveAsyncScheduler(AdaptiveScheduler, AsyncScheduler):
    """Schedules asynchronously: a step is scheduled before the tokens of the step before it are known."""


def _scheduled_by_each_rank(parallel: Any) -> bool:
    """Returns whether ranks that run one model together each have a scheduler: those must choose alike."""
    return parallel.distributed_executor_backend == "external_launcher" and parallel.world_size > 1


def _decoding(step: SchedulerOutput) -> list[str]:
    """Returns the requests that decode in a step: all their tokens are drafts but the one before these."""
    drafts = step.scheduled_spec_decode_tokens
    return [name for name, n in step.num_scheduled_tokens.items() if n == 1 + len(drafts.get(name, ()))]


def _committed(step: SchedulerOutput, output: ModelRunnerOutput) -> list[int]:
    """Returns the number of tokens that each decoding request got."""
    rows, sampled = output.req_id_to_index, output.sampled_token_ids
    return [len(sampled[rows[name]]) if sampled and name in rows else 0 for name in _decoding(step)]
