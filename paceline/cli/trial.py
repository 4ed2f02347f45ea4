"""Trains a tiny policy for two steps to check that the main job runs on this machine.

Scoring processes import this file for its reward, so it imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.cli.rank import rank_command

_TIMEOUT_SECONDS = 180.0
_OVERRIDES = (
    "steps=2",  # the first chooses the drafter's vocabulary, the second trains the drafter
    "rollout.dtype=bfloat16",  # covers packed products and kernels, as in the quickstart
    "policy.mixed_precision=bf16",
    "task.reward=paceline.cli.trial:share_of_digits",
    "drafter.schedule=always",  # trains the drafter even though no rank idles in so short a step
    "measure.plain_every=1",
)
_ERROR = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:[\w.]+(?:Error|Exception|Interrupt)|paceline)\b: .*)$")
_FUSION = re.compile(r"\d+ of \d+ decoder layers fused.*")
_UNFUSED = re.compile(r"UnfusedWarning: (.*)")


class TrialFailed(Exception):
    """Raised when the run does not finish; the message is the reason in one line."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The results of a trial run.

    Attributes:
        ranks: Number of processes that trained together.
        seconds: Duration of the run from the start of its processes.
        metrics: Metrics of the last step, as in metrics.jsonl.
        exported: Whether the drafter was exported in the format that vLLM and SGLang load.
        fusion: The run's line on how many decoder layers ran fused.
        unfused: Reason why the engine decodes without fused layers; None if it uses them.
    """

    ranks: int
    seconds: float
    metrics: dict[str, Any]
    exported: bool
    fusion: str
    unfused: str | None


def share_of_digits(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """Returns each completion's share of digits, a reward of which even a random policy gets some.

    The signature is TRL's.
    """
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def run_trial(ranks: int) -> Trial:
    """Trains a tiny random policy for two steps.

    The run covers rollouts with speculation, policy updates, a drafter update and the drafter's export.

    Args:
        ranks: Number of processes to train with.

    Raises:
        TrialFailed: If the run fails or takes more than three minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        begin = time.monotonic()
        output = _run(rank_command(ranks, ["tiny", *_OVERRIDES, f"out={run}"]))
        seconds = time.monotonic() - begin
        try:
            metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        except (OSError, ValueError, IndexError) as error:
            raise TrialFailed(f"the run left no metrics ({error})") from None
        unfused, fusion = _UNFUSED.search(output), _FUSION.search(output)
        exported = (run / "drafter" / "model.safetensors").is_file()
        fused = fusion.group(0) if fusion else "not reported"
        return Trial(ranks, seconds, metrics, exported, fused, unfused.group(1) if unfused else None)


def _run(command: list[str]) -> str:
    """Runs a command in a session of its own, so that it can be killed as a whole, and returns its output.

    Raises:
        TrialFailed: If the command fails or takes too long.
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
    }
    job = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = job.communicate(timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise TrialFailed(f"the run did not end within {_TIMEOUT_SECONDS:.0f} s") from None
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()
    if job.returncode:
        raise TrialFailed(_reason(output, job.returncode))
    return output


def _reason(output: str, status: int) -> str:
    """Returns the first error that the ranks printed, else the signal, the last line or the status."""
    for line in output.splitlines():
        error = _ERROR.match(line.strip())
        if error:
            return error.group(1)[:300]
    if status < 0:
        return f"the run was ended by signal {signal.Signals(-status).name}"
    return (output.strip().splitlines() or [f"status {status}"])[-1][:300]
