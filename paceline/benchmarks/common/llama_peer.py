"""Decodes a JSON file of requests with llama.cpp, one after the other, and times it.

The interpreter of llama.cpp's own environment runs this script; Paceline need not be installed there:
``.venv-llama/bin/python paceline/benchmarks/common/llama_peer.py MODEL.gguf WORKLOAD.json OUT.json``, after
``make peers-llama``. The workload and the result are those of ``vllm_peer.py``, with three differences:

- ``slots`` and ``speculative`` are ignored: one sequence is decoded at a time, plainly;
- ``threads`` is the number of threads;
- the result also has ``completions``, the lists of tokens of the fastest pass.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp


class Decoder:
    """Decodes one sequence at a time with llama.cpp's defaults: weights mapped, a float16 cache.

    Args:
        file: GGUF file of the policy.
        context: Largest number of tokens of a prompt and its completion.
        threads: Number of threads.

    Raises:
        RuntimeError: llama.cpp does not load the file.
    """

    def __init__(self, file: str, context: int, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            file.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {file}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = context  # a prompt is one batch
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)

    def decode(self, request: dict[str, Any], sampling: dict[str, float | int]) -> list[int]:
        """Returns the tokens that are drawn after a request's prompt; the likeliest at temperature 0."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        sampler = _sampler(sampling, request["seed"])
        tokens: list[int] = []
        fed = request["prompt"]
        while len(tokens) < request["tokens"]:
            array = (llama_cpp.llama_token * len(fed))(*fed)
            failed = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(fed)))
            if failed:
                raise RuntimeError(f"llama.cpp does not decode: error {failed}")
            tokens.append(llama_cpp.llama_sampler_sample(sampler, self._context, -1))
            fed = tokens[-1:]
        llama_cpp.llama_sampler_free(sampler)
        return tokens


def _sampler(sampling: dict[str, float | int], seed: int) -> Any:
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for sampler in (
        llama_cpp.llama_sampler_init_temp(sampling["temperature"]),
        llama_cpp.llama_sampler_init_top_k(sampling["top_k"]),
        llama_cpp.llama_sampler_init_top_p(sampling["top_p"], 1),
        llama_cpp.llama_sampler_init_dist(seed),
    ):
        llama_cpp.llama_sampler_chain_add(chain, sampler)
    return chain


def _timed_pass(
    decoder: Decoder, requests: list[dict[str, Any]], sampling: dict[str, float | int]
) -> tuple[float, list[list[int]]]:
    begin = time.perf_counter()
    completions = [decoder.decode(request, sampling) for request in requests]
    return time.perf_counter() - begin, completions


def main() -> None:
    """Loads the file, runs the warm-up and the timed passes, and writes the result."""
    model, source, target = sys.argv[1:4]
    work = json.loads(Path(source).read_text())
    context = max(len(r["prompt"]) + r["tokens"] for r in [*work["warm"], *work["timed"]])
    decoder = Decoder(model, context, work["threads"])
    _timed_pass(decoder, work["warm"], work["sampling"])
    seconds, completions = min(
        _timed_pass(decoder, work["timed"], work["sampling"]) for _ in range(work["repeats"])
    )
    result = {"seconds": seconds, "tokens": sum(map(len, completions)), "completions": completions}
    Path(target).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
