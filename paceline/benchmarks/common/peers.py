"""The same requests through transformers' generate, and through vLLM in its own environment."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from paceline.rl.errors import UserError
from paceline.rollout import Request

VLLM_METHODS: dict[str, dict[str, Any] | None] = {
    "vLLM plain": None,
    "vLLM n-gram": {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    },
}
_TIMEOUT_SECONDS = 1800


class _EachItsLength(StoppingCriteria):
    """Ends sequence i of a batch after ``lengths[i]`` new tokens."""

    def __init__(self, prompt: int, lengths: Sequence[int]) -> None:
        self._ends = torch.tensor(lengths) + prompt

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any
    ) -> torch.BoolTensor:
        return torch.BoolTensor(input_ids.shape[1] >= self._ends)


class Peers:
    """Runs what the engine is compared with.

    Args:
        policy: For transformers' generate, with its default (SDPA) attention.
        path: The same policy's directory, for vLLM.
        python: Interpreter of an environment with vLLM (``make peers``), or None to leave vLLM out.
    """

    def __init__(self, policy: PreTrainedModel, path: Path, python: Path | None) -> None:
        self._policy, self._path, self._python = policy, path, python

    def generate(
        self, slots: int, timed: Sequence[Request], warm: Sequence[Request], repeats: int
    ) -> Iterator[tuple[str, int, float]]:
        """(method, completion tokens, seconds) of left-padded batches of ``slots``."""
        self._generate_batch([*warm][:slots], most=8)
        best = float("inf")
        for _ in range(repeats):
            torch.manual_seed(0)
            begin = time.perf_counter()
            for start in range(0, len(timed), slots):
                self._generate_batch(timed[start : start + slots])
            best = min(best, time.perf_counter() - begin)
        yield "generate", sum(r.params.max_tokens for r in timed), best

    @torch.no_grad()
    def _generate_batch(self, requests: Sequence[Request], most: int | None = None) -> None:
        longest = max(len(r.prompt_ids) for r in requests)
        ids = torch.tensor([[0] * (longest - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests])
        mask = torch.tensor([[0] * (longest - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests])
        params, lengths = requests[0].params, [r.params.max_tokens for r in requests]
        generate: Any = self._policy.generate
        out = generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            max_new_tokens=most or max(lengths),
            eos_token_id=[self._policy.config.vocab_size],  # none: lengths are given
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([_EachItsLength(longest, lengths)]),
        )
        wanted = longest + (most or max(lengths))
        if out.shape[1] > wanted:
            raise RuntimeError(f"generate made {out.shape[1]} tokens a row, {wanted} were asked for")

    def vllm(
        self, workloads: Mapping[str, tuple[int, Sequence[Request], Sequence[Request]]], repeats: int
    ) -> Iterator[tuple[str, str, int, float]]:
        """(workload, method, completion tokens, seconds).

        Raises:
            UserError: when vLLM fails, with its last line.
        """
        if self._python is None:
            return
        for method, speculative in VLLM_METHODS.items():
            for name, (slots, timed, warm) in workloads.items():
                record = self.run_vllm(slots, timed, warm, repeats, speculative)
                yield name, method, record["tokens"], record["seconds"]

    def run_vllm(
        self,
        slots: int,
        timed: Sequence[Request],
        warm: Sequence[Request],
        repeats: int,
        speculative: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """One workload in a process of its own, so that what vLLM reserves is given back: what
        paceline/benchmarks/common/vllm_peer.py writes.

        Raises:
            UserError: when vLLM fails, with its last line.
        """
        job = _as_json(slots, timed, warm, repeats, speculative)
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "workload.json", Path(folder) / "result.json"
            source.write_text(json.dumps(job))
            script = Path(__file__).with_name("vllm_peer.py")
            command = [str(self._python), str(script), str(self._path), str(source), str(target)]
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
            )
            if result.returncode != 0:
                lines = result.stderr.strip().splitlines() or ["no message"]
                raise UserError(f"vLLM failed in {self._python}: {lines[-1]}; make it anew with: make peers")
            return json.loads(target.read_text())


def _as_json(
    slots: int,
    timed: Sequence[Request],
    warm: Sequence[Request],
    repeats: int,
    speculative: dict[str, Any] | None,
) -> dict[str, Any]:
    def plain(requests: Sequence[Request]) -> list[dict[str, Any]]:
        return [
            {"prompt": list(r.prompt_ids), "tokens": r.params.max_tokens, "seed": r.seed & 0xFFFFFFFF}
            for r in requests
        ]

    p = timed[0].params
    sampling = {"temperature": p.temperature, "top_k": p.top_k, "top_p": p.top_p}
    return {
        "slots": slots,
        "repeats": repeats,
        "warm": plain(warm),
        "timed": plain(timed),
        "sampling": sampling,
        "speculative": speculative,
    }
