"""Runs requests through transformers' generate, and through vLLM and llama.cpp in their own environments."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from paceline.benchmarks.common.gguf_export import is_plain_llama, write_gguf
from paceline.benchmarks.common.peer_process import PeerProcess, Turns
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
PEERS_PYTHON = Path(".venv-peers/bin/python")  # where `make peers` puts vLLM
LLAMA_METHODS = {"llama.cpp bf16": "bf16", "llama.cpp f16": "f16"}  # types of matrices by method
LLAMA_PYTHON = Path(".venv-llama/bin/python")  # where `make peers-llama` puts llama.cpp
_LLAMA_BUILD = "import llama_cpp as l; print(l.__version__, l.llama_print_system_info().decode())"
_VLLM = PeerProcess("vLLM", "vllm_peer.py", "peers")
_LLAMA = PeerProcess("llama.cpp", "llama_peer.py", "peers-llama")


class _PerSequenceLength(StoppingCriteria):
    """Ends sequence i of a batch after ``lengths[i]`` new tokens."""

    def __init__(self, prompt: int, lengths: Sequence[int]) -> None:
        self._ends = torch.tensor(lengths) + prompt

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any
    ) -> torch.BoolTensor:
        return torch.BoolTensor(input_ids.shape[1] >= self._ends)


class Peers:
    """Runs the generators that the engine is compared with.

    Args:
        policy: Policy that transformers' generate runs, with its default (SDPA) attention.
        path: Directory of the policy, which vLLM loads.
        python: Interpreter of an environment with vLLM (``make peers``); None leaves vLLM out.
        llama: Interpreter of an environment with llama.cpp (``make peers-llama``); None leaves it out.
    """

    def __init__(
        self, policy: PreTrainedModel, path: Path, python: Path | None, llama: Path | None = None
    ) -> None:
        self._policy, self._path, self._python = policy, path, python
        self._llama = llama if is_plain_llama(policy.config) else None

    def generate(
        self, slots: int, timed: Sequence[Request], warm: Sequence[Request], repeats: int
    ) -> Iterator[tuple[str, int, float]]:
        """Times transformers' generate on left-padded batches of ``slots`` sequences.

        Yields:
            The method, its completion tokens and the seconds of the fastest pass.
        """
        self._generate_batch([*warm][:slots], max_tokens=8)
        best = float("inf")
        for _ in range(repeats):
            torch.manual_seed(0)
            begin = time.perf_counter()
            for start in range(0, len(timed), slots):
                self._generate_batch(timed[start : start + slots])
            best = min(best, time.perf_counter() - begin)
        yield "generate", sum(r.params.max_tokens for r in timed), best

    @torch.no_grad()
    def _generate_batch(self, requests: Sequence[Request], max_tokens: int | None = None) -> None:
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
            max_new_tokens=max_tokens or max(lengths),
            eos_token_id=[self._policy.config.vocab_size],  # matches no token: the lengths are fixed
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([_PerSequenceLength(longest, lengths)]),
        )
        wanted = longest + (max_tokens or max(lengths))
        if out.shape[1] > wanted:
            raise RuntimeError(
                f"transformers' generate returned {out.shape[1]} tokens per row instead of {wanted}"
            )

    def vllm(
        self, workloads: Mapping[str, tuple[int, Sequence[Request], Sequence[Request]]], repeats: int
    ) -> Iterator[tuple[str, str, int, float]]:
        """Times vLLM plainly and with n-gram speculation on each workload.

        Args:
            workloads: Slots, timed requests and warm-up requests by name.
            repeats: Number of timed passes; the fastest counts.

        Yields:
            The workload, the method, its completion tokens and seconds.

        Raises:
            UserError: vLLM failed; the message has its last line.
        """
        if self._python is None:
            return
        for method, speculative in VLLM_METHODS.items():
            records = self.run_vllm(list(workloads.values()), repeats, speculative)
            for name, record in zip(workloads, records, strict=True):
                yield name, method, record["tokens"], record["seconds"]

    def run_vllm(
        self,
        workloads: Sequence[tuple[int, Sequence[Request], Sequence[Request]]],
        repeats: int,
        speculative: dict[str, Any] | None,
        *,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Runs workloads with vLLM, one after the other, in a process that gives its memory back at its end.

        Args:
            workloads: Slots, timed requests and warm-up requests of each.
            repeats: Number of timed passes; the fastest counts.
            speculative: vLLM's ``speculative_config``; None decodes plainly.
            environment: Variables to add to those of this process; None adds none.
            **options: Further arguments of vLLM's ``LLM``.

        Returns:
            The results that `paceline.benchmarks.common.vllm_peer` writes.

        Raises:
            UserError: vLLM failed; the message has its last line.
        """
        jobs = [_as_json(*workload) for workload in workloads]
        shared = _sampling(workloads[0][1]) | {"repeats": repeats}
        job = {"workloads": jobs, **shared, "speculative": speculative, "options": options}
        return _VLLM.run(self._python, self._path, job, environment)

    def vllm_turns(
        self,
        workloads: Sequence[tuple[int, Sequence[Request], Sequence[Request]]],
        speculative: dict[str, Any] | None,
        **options: Any,
    ) -> AbstractContextManager[Turns]:
        """Starts vLLM in a process that waits, so that several settings can decode in turn.

        Args:
            workloads: Slots, timed requests and warm-up requests of each.
            speculative: vLLM's ``speculative_config``; None decodes plainly.
            **options: Further arguments of vLLM's ``LLM``.

        Returns:
            A context whose value takes the number of a workload and ``warm`` or ``timed``, and returns the
            result of the pass, see `paceline.benchmarks.common.vllm_peer`.
        """
        job = {"workloads": [_as_json(*workload) for workload in workloads], **_sampling(workloads[0][1])}
        job |= {"speculative": speculative, "options": options}
        return _VLLM.turns(self._python, self._path, job)

    def llama_build(self) -> str | None:
        """Returns llama.cpp's version and instruction sets; None where it is left out.

        It is left out without its environment, and for policies that are not plain Llamas.

        Raises:
            UserError: It cannot be imported; the message has the error.
        """
        if self._llama is None:
            return None
        return _LLAMA.output(self._llama, ["-c", _LLAMA_BUILD]).strip()

    def llama(
        self, timed: Sequence[Request], warm: Sequence[Request], repeats: int
    ) -> Iterator[tuple[str, int, float]]:
        """Times llama.cpp on one sequence at a time, with as many threads as torch has here.

        Args:
            timed: Requests that are timed.
            warm: Requests of the warm-up pass.
            repeats: Number of timed passes; the fastest counts.

        Yields:
            The method, its completion tokens and seconds; nothing where llama.cpp is left out.

        Raises:
            UserError: llama.cpp failed; the message has its last line.
        """
        if self._llama is None:
            return
        for method, weights in LLAMA_METHODS.items():
            record = self.run_llama(timed, warm, repeats, weights)
            yield method, record["tokens"], record["seconds"]

    def run_llama(
        self, timed: Sequence[Request], warm: Sequence[Request], repeats: int, weights: str
    ) -> dict[str, Any]:
        """Runs requests with llama.cpp in a process of its own, on the policy's present weights.

        Args:
            timed: Requests that are timed.
            warm: Requests of the warm-up pass.
            repeats: Number of timed passes; the fastest counts.
            weights: Type of the matrices, see `write_gguf`.

        Returns:
            The result that `paceline.benchmarks.common.llama_peer` writes.

        Raises:
            UserError: llama.cpp failed; the message has its last line.
        """
        job = _as_json(1, timed, warm) | _sampling(timed) | {"repeats": repeats}
        job["threads"] = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "policy.gguf"
            write_gguf(self._policy, file, weights)
            return _LLAMA.run(self._llama, file, job)


def _as_json(slots: int, timed: Sequence[Request], warm: Sequence[Request]) -> dict[str, Any]:
    """Returns a workload as `paceline.benchmarks.common.vllm_peer` reads it."""

    def as_dicts(requests: Sequence[Request]) -> list[dict[str, Any]]:
        return [
            {"prompt": list(r.prompt_ids), "tokens": r.params.max_tokens, "seed": r.seed & 0xFFFFFFFF}
            for r in requests
        ]

    return {"slots": slots, "warm": as_dicts(warm), "timed": as_dicts(timed)}


def _sampling(requests: Sequence[Request]) -> dict[str, Any]:
    """Returns the sampling parameters that all requests share."""
    p = requests[0].params
    return {"sampling": {"temperature": p.temperature, "top_k": p.top_k, "top_p": p.top_p}}
