"""Decodes a JSON file of requests with vLLM and times it; run by the peers' own interpreter, which has no Paceline.

``.venv-peers/bin/python launch/peer_vllm.py MODEL WORKLOAD.json OUT.json``, after ``make peers``. The workload has

- ``slots``: requests in flight together; ``repeats``: timed passes, of which the fastest counts;
- ``warm``, ``timed``: lists of ``{"prompt": [ids], "tokens": n, "seed": s}``; every completion has exactly its number of tokens;
- ``sampling``: temperature, top_k, top_p; ``speculative``: vLLM's ``speculative_config``, or null.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process: no transport between it and the clock
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

from vllm import LLM, SamplingParams


def decode(llm: LLM, requests: list[dict], sampling: dict) -> tuple[float, int]:
    """Seconds and completion tokens of one pass."""
    params = [
        SamplingParams(**sampling, max_tokens=r["tokens"], seed=r["seed"], ignore_eos=True, detokenize=False) for r in requests
    ]
    begin = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": r["prompt"]} for r in requests], params, use_tqdm=False)
    return time.perf_counter() - begin, sum(len(o.outputs[0].token_ids) for o in outputs)


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
        disable_log_stats=True,
    )
    decode(llm, work["warm"], work["sampling"])
    seconds, tokens = min(decode(llm, work["timed"], work["sampling"]) for _ in range(work["repeats"]))
    Path(target).write_text(json.dumps({"seconds": seconds, "tokens": tokens}))


if __name__ == "__main__":
    main()
