"""Command lines and environments of servers for a policy and its drafter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paceline.rollout.backends.adaptive.vllm_options import ADAPTIVE_SCHEDULER
from paceline.rollout.backends.exchange import DIRECTORY, TOKEN, make_token

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve_command(
    model: Path | str,
    *,
    drafter: Path | None = None,
    depth: int = 4,
    schedule: Sequence[tuple[int, int, int]] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    max_slots: int = 64,
    max_context: int = 4096,
    updates: bool = False,
    parallel: bool = False,
    more: Sequence[str] = (),
) -> list[str]:
    """Returns the ``vllm serve`` command line for a policy and its drafter.

    Parameters that a request leaves out take vLLM's neutral defaults, not those of the policy's
    ``generation_config.json``.

    Args:
        model: Directory or hub id of the policy.
        drafter: Directory in the export format; None serves without drafts.
        depth: Maximum draft tokens of a step.
        schedule: (from, to, draft tokens) by batch size, such as `DepthControl.schedule` learns; empty lets
            the adaptive scheduler choose from 0 to ``depth`` in each step.
        host: Address that the server listens on.
        port: Port that the server listens on.
        max_slots: Maximum number of sequences decoded together.
        max_context: Maximum tokens of prompt and completion together.
        updates: Whether the server accepts new weights from a trainer. The endpoints are vLLM's development
            ones: the environment of the server needs the variables of `serve_environment`.
        parallel: Whether the drafter, which has learned it, drafts in one pass; each step then has ``depth``
            draft tokens.
        more: Further arguments, such as ``--tensor-parallel-size 4``.

    Raises:
        ValueError: Drafts in one pass are asked for with a schedule.
    """
    if parallel and schedule:
        raise ValueError("drafts in one pass have a fixed number of tokens: leave the schedule out")
    command = ["vllm", "serve", str(model), "--host", host, "--port", str(port)]
    command += ["--max-num-seqs", str(max_slots), "--max-model-len", str(max_context)]
    command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    if updates:
        command += ["--weight-transfer-config", json.dumps({"backend": "paceline_files"})]
        command += ["--middleware", "paceline.rollout.backends.vllm_guard.UpdateGuard"]
    if drafter is not None:
        speculative: dict[str, Any] = {
            "method": "eagle3",
            "model": str(drafter),
            "num_speculative_tokens": depth,
        }
        if parallel:
            speculative["parallel_drafting"] = True
        elif schedule:
            speculative["num_speculative_tokens_per_batch_size"] = [list(entry) for entry in schedule]
        else:
            command += ["--scheduler-cls", ADAPTIVE_SCHEDULER]
        command += ["--speculative-config", json.dumps(speculative)]
    return [*command, *more]


def serve_environment(exchange: Path, host: str) -> dict[str, str]:
    """Returns the environment variables of a server that accepts new weights.

    The server reads weights from ``exchange`` alone, and asks for its token. On an address that other
    machines can reach, completions need the token too.

    Raises:
        OSError: The directory cannot be written.
    """
    token = make_token(exchange)
    variables = {"VLLM_SERVER_DEV_MODE": "1", DIRECTORY: str(exchange.resolve()), TOKEN: token}
    return variables if host in LOOPBACK else {**variables, "VLLM_API_KEY": token}


def sglang_command(
    model: Path | str, drafter: Path | None, depth: int, host: str, port: int, more: Sequence[str] = ()
) -> list[str]:
    """Returns the command line that starts SGLang with the same policy and drafter.

    It follows SGLang's documentation and was not run here.

    Args:
        model: Directory or hub id of the policy.
        drafter: Directory in the export format; None serves without drafts.
        depth: Draft tokens of a step, which form a chain as in vLLM.
        host: Address that the server listens on.
        port: Port that the server listens on.
        more: Further arguments.
    """
    chain = {
        "--speculative-draft-model-path": drafter,
        "--speculative-num-steps": depth,
        "--speculative-eagle-topk": 1,
        "--speculative-num-draft-tokens": depth + 1,
    }
    speculative = [str(part) for entry in chain.items() for part in entry]
    command = ["python", "-m", "sglang.launch_server", "--model-path", str(model)]
    command += ["--host", host, "--port", str(port)]
    command += ["--sampling-defaults", "openai"]  # neutral, unlike the policy's generation_config.json
    if drafter is not None:
        command += ["--speculative-algorithm", "EAGLE3", *speculative]
    return [*command, *more]
