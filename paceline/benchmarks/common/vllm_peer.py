"""Decodes a JSON file of requests with vLLM and times it; run by the peers' own interpreter, which has no
Paceline.

``.venv-peers/bin/python paceline/benchmarks/common/vllm_peer.py MODEL WORKLOAD.json OUT.json``, after
``make peers``. The workload has

- ``slots``: requests in flight together; ``repeats``: timed passes, of which the fastest counts;
- ``warm``, ``timed``: lists of ``{"prompt": [ids], "tokens": n, "seed": s}``; every completion has exactly
  its number of tokens;
- ``sampling``: temperature, top_k, top_p; ``speculative``: vLLM's ``speculative_config``, or null.

With a ``speculative_config`` the result has vLLM's own count of drafts and accepted tokens, over all passes.
"""

import json
import os
import sys
import time
from pathlib import Path

# the engine in this process: no transport between it and the clock
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

from vllm import LLM, SamplingParams


def decode(llm: LLM, requests: list[dict], sampling: dict) -> tuple[float, int]:
    """Seconds and completion tokens of one pass."""
    params = [
        SamplingParams(**sampling, max_tokens=r["tokens"], seed=r["seed"], ignore_eos=True, detokenize=False)
        for r in requests
    ]
    begin = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": r["prompt"]} for r in requests], params, use_tqdm=False)
    return time.perf_counter() - begin, sum(len(o.outputs[0].token_ids) for o in outputs)


def counters(llm: LLM) -> dict[str, float]:
    """vLLM's totals of speculation so far."""
    names = {"vllm:spec_decode_num_drafts": "drafts", "vllm:spec_decode_num_accepted_tokens": "accepted"}
    return {names[m.name]: m.value for m in llm.get_metrics() if m.name in names}


def main() -> None:
    model, source, target = sys.argv[1:4]
    work = json.loads(Path(source).read_text())
    llm = LLM(
        model,
        dtype="bfloat16",
        enforce_eager=True,  # on a CPU compilation takes minutes
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
