"""The model card of a drafter: its target, its acceptance and how to serve it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

_TAGS = ["eagle3", "speculative-decoding", "draft-model", "vllm", "sglang", "paceline"]
_DEPTH = 4  # draft tokens per verification in the serving commands
_PARALLEL = """It also drafts all tokens in one pass (P-EAGLE): add `"parallel_drafting": true` to the config.

"""


@dataclass(frozen=True, slots=True)
class DrafterFacts:
    """What is known about a drafter besides its weights.

    Attributes:
        target: The policy that it drafts for: a hub id, a directory or a name.
        base_model: The target's id on the Hugging Face hub; None if it has none.
        license: License identifier as the hub writes it, such as ``apache-2.0``; None if unknown.
        steps: Number of RL steps that the target had been trained for; None if unknown.
        temperature: Sampling temperature of the rollouts that it was trained on.
        acceptance_length: Tokens per forward pass of the target, measured in the run; None if not measured.
        acceptance: Expected acceptance Σ min(p, q) at draft positions 1, 2, …; empty if not measured.
        parallel: Whether it can draft in one pass.
    """

    target: str
    base_model: str | None = None
    license: str | None = None
    steps: int | None = None
    temperature: float | None = None
    acceptance_length: float | None = None
    acceptance: Sequence[float] = ()
    parallel: bool = False


def drafter_card(facts: DrafterFacts, draft_vocab_size: int, name: str = "DRAFTER") -> str:
    """Returns the text of ``README.md``, with the front matter that the hub reads.

    Args:
        facts: What is known about the drafter.
        draft_vocab_size: Number of tokens that it can draft.
        name: Hub id or directory of the drafter in the serving commands.
    """
    front = ModelCardData(
        base_model=facts.base_model,
        license=facts.license,
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=_TAGS,
    )
    target = facts.base_model or "TARGET"
    trained = "" if facts.steps is None else f", after {facts.steps} RL steps"
    sampled = "" if facts.temperature is None else f", sampled at temperature {facts.temperature:g}"
    length = (
        "not measured"
        if facts.acceptance_length is None
        else f"{facts.acceptance_length:.2f} tokens per forward pass of the target"
    )
    positions = ", ".join(f"{a:.2f}" for a in facts.acceptance) or "not measured"
    return f"""---
{front.to_yaml()}
---

# EAGLE-3 drafter for `{facts.base_model or facts.target}`

Distilled by Paceline while its target was trained.

- Target: `{facts.target}`{trained}
- Data: the target's own rollouts{sampled}
- Draft vocabulary: {draft_vocab_size} tokens
- Acceptance length in the run: {length}
- Expected acceptance at draft positions 1, 2, …: {positions} (Σ min(p, q))
- Format: `LlamaForCausalLMEagle3`. The input embedding is the target's and is not stored here.

## Serving

{"" if facts.base_model else "`TARGET` stands for the target's directory or hub id."}
With vLLM:

```bash
vllm serve {target} \\
  --speculative-config '{{"method": "eagle3", "model": "{name}", "num_speculative_tokens": {_DEPTH}}}'
```

{_PARALLEL if facts.parallel else ""}With SGLang:

```bash
python -m sglang.launch_server --model-path {target} \\
  --speculative-algorithm EAGLE3 --speculative-draft-model-path {name} \\
  --speculative-num-steps {_DEPTH} --speculative-eagle-topk 1 --speculative-num-draft-tokens {_DEPTH + 1}
```
"""


def license_of(directory: Path) -> str | None:
    """Returns the license in the front matter of a directory's ``README.md``; None if there is none."""
    try:
        license_id = ModelCard.load(directory / "README.md").data.license
    except Exception:  # a card may hold anything; without a readable license, none is stated
        return None
    return license_id if isinstance(license_id, str) else None
