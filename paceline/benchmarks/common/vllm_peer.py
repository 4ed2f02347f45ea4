"""Decodes workloads from a JSON file with vLLM and times them.

The peers' own interpreter runs this script; Paceline need not be installed there:
``.venv-peers/bin/python paceline/benchmarks/common/vllm_peer.py MODEL WORK.json OUT.json``, after
``make peers``. The work is an object with

- ``workloads``: list of ``{"slots": number of requests decoded concurrently, "warm": requests, "timed":
  requests}``; a request is ``{"prompt": [ids], "tokens": n, "seed": s}``, and every completion has exactly
  its number of tokens;
- ``repeats``: number of timed passes of each workload, of which the fastest counts;
- ``sampling``: temperature, top_k and top_p;
- ``speculative``: vLLM's ``speculative_config``, or null for plain decoding;
- ``options``: further arguments of vLLM's ``LLM``.

The result is a list with ``{"seconds": s, "tokens": n}`` of each workload's fastest pass. With a
``speculative_config`` it also has ``drafts`` and ``accepted``: vLLM's own counts of drafts and accepted
tokens over all passes of the workload, the warm-up included.
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
    """Returns vLLM's counts of drafts and accepted draft tokens since the engine started, if it counts."""
    if not llm.llm_engine.log_stats:
        return {}
    names = {"vllm:spec_decode_num_drafts": "drafts", "vllm:spec_decode_num_accepted_tokens": "accepted"}
    return {names[m.name]: m.value for m in llm.get_metrics() if m.name in names}


def run(
    llm: LLM, workload: dict[str, Any], sampling: dict[str, float | int], repeats: int
) -> dict[str, float]:
    """Runs a workload's warm-up and timed passes and returns its result, see the module's docstring."""
    # the engine runs in this process, so its scheduler can be told how many requests run at a time
    llm.llm_engine.engine_core.engine_core.scheduler.max_num_active_reqs = workload["slots"]
    before = counters(llm)
    decode(llm, workload["warm"], sampling)
    seconds, tokens = min(decode(llm, workload["timed"], sampling) for _ in range(repeats))
    counted = {name: value - before.get(name, 0) for name, value in counters(llm).items()}
    return {"seconds": seconds, "tokens": tokens, **counted}


def main() -> None:
    """Loads the model, runs the workloads and writes the results."""
    model, source, target = sys.argv[1:4]
    work = json.loads(Path(source).read_text())
    llm = LLM(
        model,
        dtype="bfloat16",
        enforce_eager=True,  # compilation takes minutes on a CPU
        max_model_len=4096,
        max_num_seqs=max(w["slots"] for w in work["workloads"]),
        speculative_config=work["speculative"],
        disable_log_stats=work["speculative"] is None,
        **work["options"],
    )
    results = [run(llm, w, work["sampling"], work["repeats"]) for w in work["workloads"]]
    Path(target).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
