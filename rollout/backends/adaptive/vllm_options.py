"""Paceline's options for a vLLM that someone else starts, from the environment variable ``PACELINE_VLLM``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "PACELINE_VLLM"
STATUS_VARIABLE = (
    "PACELINE_VLLM_STATUS"  # directory of the status, set by the process that starts the engine core
)
ADAPTIVE_SCHEDULER = "paceline.rollout.backends.vllm_scheduler.AdaptiveScheduler"
# The methods whose proposers accept less than the maximum depth, or whose drafts can be cut. Of the others,
# vLLM 0.32's suffix, medusa, ngram_gpu and extract_hidden_states assert that it is the maximum.
ADAPTIVE_METHODS = ("eagle", "eagle3", "draft_model", "ngram", "custom_class")


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """What ``PACELINE_VLLM`` says, as a JSON object with these keys.

    Attributes:
        speculative: vLLM's ``speculative_config``, used unless the program that starts vLLM gives its own.
        adaptive: Whether the draft depth of each step is chosen from measured times; likewise unless the
            program gives a scheduler class.
        state: Directory in which what was learned is kept for the next start; None keeps nothing.
        probe_seconds: Seconds between the watchdog's verdict that a drafter is dead and the first probe.
        suffix_tokens: Number of tokens of prompts and completions that `GroupSuffixProposer` keeps at least,
            up to 650 bytes each in every worker; beyond it, the least recently used prompts are dropped.
    """

    speculative: dict[str, Any] | None = None
    adaptive: bool = True
    state: Path | None = None
    probe_seconds: float = 30.0
    suffix_tokens: int = 500_000

    @classmethod
    def parse(cls, text: str) -> VllmOptions:
        """Parses the variable's value.

        Raises:
            ValueError: The text is no such object; the message is one line and names the key.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f'{VARIABLE} is not JSON ({error}): write for example {{"state": "/var/lib/paceline"}}'
            ) from None
        if not isinstance(values, dict):
            raise ValueError(f"{VARIABLE} is not an object: write {{...}} with keys of {', '.join(_KINDS)}")
        for key, value in values.items():
            if key not in _KINDS:
                raise ValueError(f"{VARIABLE}: the key {key!r} is unknown: write one of {', '.join(_KINDS)}")
            fits, wanted = _KINDS[key]
            if not fits(value):
                raise ValueError(f"{VARIABLE}: {key} is {json.dumps(value)}: write {wanted}")
        if "state" in values:
            values["state"] = Path(values["state"])
        return cls(**values)


# of each key: whether a value fits, and what to write
_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "speculative": (lambda v: isinstance(v, dict), 'vLLM\'s speculative config, {"method": "ngram", ...}'),
    "adaptive": (lambda v: isinstance(v, bool), "true or false"),
    "state": (lambda v: isinstance(v, str) and bool(v), "the name of a directory"),
    "probe_seconds": (
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and v > 0,
        "a number of seconds above 0",
    ),
    "suffix_tokens": (
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0,
        "a number of tokens above 0",
    ),
}


def options_from_environment() -> VllmOptions | None:
    """Returns the options of this process; None if the variable is not set.

    Raises:
        ValueError: See `VllmOptions.parse`.
    """
    text = os.environ.get(VARIABLE)
    return None if text is None else VllmOptions.parse(text)
