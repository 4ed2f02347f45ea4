"""Trains a tiny policy for two steps, to find out whether the main job runs on a machine.

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

_SECONDS = 180.0
_RECIPE = (
    "steps=2",  # the first chooses the drafter's vocabulary, the second trains it
    "rollout.dtype=bfloat16",  # as in the quickstart: packed products and kernels are tried, too
    "policy.mixed_precision=bf16",
    "task.reward=paceline.cli.trial:share_of_digits",
    "drafter.schedule=always",  # a rank that does not idle in so short a step trains the drafter all the same
    "measure.plain_every=1",
)
_ERROR = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:[\w.]+(?:Error|Exception|Interrupt)|paceline)\b: .*)$")
_FUSION = re.compile(r"\d+ of \d+ decoder layers fused.*")
_UNFUSED = re.compile(r"UnfusedWarning: (.*)")


class TrialFailed(Exception):
    """The run did not finish; the message is the reason, in one line."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What was seen of the run.

    Attributes:
        ranks: Processes that trained together.
        seconds: Duration of the whole run, from the start of its processes.
        metrics: The last step's metrics, as in metrics.jsonl.
        exported: Whether the drafter was written in the format that vLLM and SGLang load.
        fusion: Which decoder layers ran fused, as the run said.
        unfused: Why the engine decodes without fused layers, if it does.
    """

    ranks: int
    seconds: float
    metrics: dict[str, Any]
    exported: bool
    fusion: str
    unfused: str | None


def share_of_digits(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """A reward, in TRL's signature, that a random policy gets some of."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def run_trial(ranks: int) -> Trial:
    """Trains a tiny random policy for two steps: rollouts with speculation, an update, a drafter update, an
    exported drafter.

    Args:
        ranks: Processes to train with.

    Raises:
        TrialFailed: when the run does not end well within three minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        begin = time.monotonic()
        said = _finished(rank_command(ranks, ["tiny", *_RECIPE, f"out={run}"]))
        seconds = time.monotonic() - begin
        try:
            metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        except (OSError, ValueError, IndexError) as error:
            raise TrialFailed(f"the run left no metrics ({error})") from None
        unfused, fusion = _UNFUSED.search(said), _FUSION.search(said)
        exported = (run / "drafter" / "model.safetensors").is_file()
        fused = fusion.group(0) if fusion else "not said"
        return Trial(ranks, seconds, metrics, exported, fused, unfused.group(1) if unfused else None)


def _finished(command: list[str]) -> str:
    """Runs the ranks in a session of their own; returns what they said."""
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
        said, _ = job.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise TrialFailed(f"the run did not end within {_SECONDS:.0f} s") from None
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()
    if job.returncode:
        raise TrialFailed(_reason(said, job.returncode))
    return said


def _reason(said: str, status: int) -> str:
    """The first error that the ranks printed, in one line."""
    for line in said.splitlines():
        found = _ERROR.match(line.strip())
        if found:
            return found.group(1)[:300]
    if status < 0:
        return f"the run was ended by signal {signal.Signals(-status).name}"
    return (said.strip().splitlines() or [f"status {status}"])[-1][:300]
