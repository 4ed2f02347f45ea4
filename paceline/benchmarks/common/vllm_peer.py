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

With a fourth argument, ``turns``, passes are run on request, so that several processes can take turns. Each
line of standard input, ``[workload, "warm" or "timed"]``, is answered by a line of standard output that
begins with ``PASS`` and has the result of that pass; if Paceline's scheduler chooses draft depths, it has
``depths``, the number of steps by depth. The end of the input ends the process.
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


def set_slots(llm: LLM, slots: int) -> None:
    """Sets how many requests are decoded concurrently; the engine runs in this process."""
    llm.llm_engine.engine_core.engine_core.scheduler.max_num_active_reqs = slots


def run(
    llm: LLM, workload: dict[str, Any], sampling: dict[str, float | int], repeats: int
) -> dict[str, float]:
    """Runs a workload's warm-up and timed passes and returns its result, see the module's docstring."""
    set_slots(llm, workload["slots"])
    before = counters(llm)
    decode(llm, workload["warm"], sampling)
    seconds, tokens = min(decode(llm, workload["timed"], sampling) for _ in range(repeats))
    counted = {name: value - before.get(name, 0) for name, value in counters(llm).items()}
    return {"seconds": seconds, "tokens": tokens, **counted}


def steps_by_depth(llm: LLM) -> dict[str, int] | None:
    """Returns the number of steps by draft depth; None if Paceline's scheduler does not choose it."""
    control = getattr(llm.llm_engine.engine_core.engine_core.scheduler, "control", None)
    return None if control is None else control.status()["steps_by_depth"]


def run_on_request(llm: LLM, work: dict[str, Any]) -> None:
    """Runs the passes that standard input asks for, see the module's docstring."""
    for line in sys.stdin:
        index, kind = json.loads(line)
        workload, before, depths = work["workloads"][index], counters(llm), steps_by_depth(llm)
        set_slots(llm, workload["slots"])
        seconds, tokens = decode(llm, workload[kind], work["sampling"])
        result: dict[str, Any] = {"seconds": seconds, "tokens": tokens}
        result |= {name: value - before.get(name, 0) for name, value in counters(llm).items()}
        if depths is not None:
            result["depths"] = {k: n - depths.get(k, 0) for k, n in (steps_by_depth(llm) or {}).items()}
        print("PASS", json.dumps(result), flush=True)


def main() -> None:
    """Loads the model, runs the workloads and writes the results."""
    model, source, target, *turns = sys.argv[1:]
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
    if turns:
        run_on_request(llm, work)
        return
    results = [run(llm, w, work["sampling"], work["repeats"]) for w in work["workloads"]]
    Path(target).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
