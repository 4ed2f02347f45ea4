"""A policy for vLLM as trainers start it: they tokenize, and vLLM has no kernels for heads of 16."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from paceline.rl.models.policies import fetch_policy
from tests.engines import tiny_llama


def save_talking_policy(path: Path, cache: Path) -> Path:
    """Saves a random policy with a tokenizer in a folder and returns it; greedily, it soon repeats itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACELINE_CACHE", str(cache))
        tokenizer = AutoTokenizer.from_pretrained(fetch_policy("tiny-llama"))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(path)
    tiny_llama(len(tokenizer), sharpness=8.0, hidden=256).save_pretrained(path)
    return path
