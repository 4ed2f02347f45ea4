"""Decodes a JSON file of requests with vLLM and times it.

The peers' own interpreter runs this script; Paceline need not be installed there:
``.venv-peers/bin/python paceline/benchmarks/common/vllm_peer.py MODEL WORKLOAD.json OUT.json``, after
``make peers``. The workload is an object with

- ``slots``: number of requests decoded concurrently;
- ``repeats``: number of timed passes, of which the fastest counts;
- ``warm``, ``timed``: lists of ``{"prompt": [ids], "tokens": n, "seed": s}``; every completion has exactly
  its number of tokens;
- ``sampling``: temperature, top_k and top_p;
- ``speculative``: vLLM's ``speculative_config``, or null for plain decoding.

The result is ``{"seconds": s, "tokens": n}`` of the fastest pass. With a ``speculative_config`` it also has
``drafts`` and ``accepted``: vLLM's own counts of drafts and accepted tokens over all passes, the warm-up
included.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# runs vLLM's engine in this process, so that no transport is timed; both must be set before the import
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

from vllm import LLM, SamplingParams


def decode(llm: LLM, requests: list[dict[str, Any]], sampling: dict[str, float | int]) -> tuple[float, int]:
    """Decodes all requests once.

    Args:
        llm: vLLM's engine.
        requests: Requests of the workload, see the module's docstring.
        sampling: Temperature, top_k and top_p of every request.

    Returns:
        The seconds of the pass and its number of completion tokens.
    """
    params = [
        SamplingParams(**sampling, max_tokens=r["tokens"], seed=r["seed"], ignore_eos=True, detokenize=False)
        for r in requests
    ]
    begin = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": r["prompt"]} for r in requests], params, use_tqdm=False)
    return time.perf_counter() - begin, sum(len(o.outputs[0].token_ids) for o in outputs)


def counters(llm: LLM) -> dict[str, float]:
    """Returns vLLM's counts of drafts and accepted draft tokens since the engine started."""
    names = {"vllm:spec_decode_num_drafts": "drafts", "vllm:spec_decode_num_accepted_tokens": "accepted"}
    return {names[m.name]: m.value for m in llm.get_metrics() if m.name in names}


def main() -> None:
    """Loads the model, runs the warm-up and the timed passes, and writes the result."""
    model, source, target = sys.argv[1:4]
    work = json.loads(Path(source).read_text())
    llm = LLM(
        model,
        dtype="bfloat16",
        enforce_eager=True,  # compilation takes minutes on a CPU
        max_model_len=4096,
        max_num_seqs=work["slots"],
        speculative_config=work["speculative"],
        disable_log_stats=work["speculative"] is None,
    )
    decode(llm, work["warm"], work["sampling"])
    seconds, tokens = min(decode(llm, work["timed"], work["sampling"]) for _ in range(work["repeats"]))
    result = {"seconds": seconds, "tokens": tokens}
    Path(target).write_text(
        json.dumps(result if work["speculative"] is None else {**result, **counters(llm)})
    )


if __name__ == "__main__":
    main()
