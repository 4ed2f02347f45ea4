"""Tiny models and engines for tests of the rollout package; needs torch, transformers and pytest only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paceline.rollout import Rollout, RolloutEngine, default_tap_layers
from paceline.rollout.drafter_factory import DrafterParts, build_drafter
from paceline.rollout.drafters import DRAFTERS, DraftRules, Eagle3Drafter, SuffixDrafter
from paceline.rollout.drafters.base import DraftContext, StatelessSlots
from paceline.rollout.drafters.eagle3 import fixed_taps
from paceline.rollout.drafters.eagle3_model import Eagle3Model, eagle3_config
from paceline.rollout.strategy import Strategy
from paceline.rollout.trees import DraftTree


def tiny_llama(
    vocab_size: int = 97, seed: int = 0, layers: int = 4, sharpness: float = 1.0, hidden: int = 64
) -> LlamaForCausalLM:
    """A random float32 Llama in eval mode; ``sharpness`` scales its output head, so that its distributions
    are not all flat.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model


def tiny_eagle3(
    model: LlamaForCausalLM, draft_vocab_size: int | None = None, seed: int = 1, parallel: bool = False
) -> Eagle3Model:
    """A random drafter over every second token of the target's vocabulary (or the first ``draft_vocab_size``
    of those); with ``parallel`` it also drafts in one pass.
    """
    torch.manual_seed(seed)
    vocab = model.config.vocab_size
    vocabulary = torch.arange(0, vocab, 2)[: draft_vocab_size or vocab]
    taps = default_tap_layers(model.config.num_hidden_layers)
    drafter = Eagle3Model(eagle3_config(model.config, len(vocabulary), taps, parallel), vocabulary)
    with torch.no_grad():
        drafter.lm_head.weight.mul_(20)
        if parallel:
            drafter.mask_hidden.normal_(generator=torch.Generator().manual_seed(seed))
    return drafter


class AdversarialDrafter(StatelessSlots):
    """Random tokens from a random distribution that has nothing to do with the target's."""

    name = "adversarial"

    def __init__(self, vocab_size: int, sampled: bool, seed: int = 0) -> None:
        self._vocab, self._sampled = vocab_size, sampled
        self._generator = torch.Generator().manual_seed(seed)

    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        batch, depth = len(context.sequences), strategy.depth
        q = torch.rand(batch, depth, self._vocab, generator=self._generator).pow(4)
        q /= q.sum(-1, keepdim=True)
        tokens = torch.multinomial(q.flatten(0, 1), 1, generator=self._generator).view(batch, depth)
        lengths = torch.randint(0, depth + 1, (batch,), generator=self._generator)
        return DraftTree(tokens, lengths, None, q if self._sampled else None)


def engine_for(
    model: LlamaForCausalLM,
    *,
    slots: int = 5,
    context: int = 200,
    rules: DraftRules | None = None,
    dtype: torch.dtype = torch.float32,
    **options,
) -> RolloutEngine:
    """An engine with a drafter of each kind."""
    engine = RolloutEngine(
        model,
        dtype=dtype,
        max_slots=slots,
        max_context=context,
        tap_layers=default_tap_layers(model.config.num_hidden_layers),
        **options,
    )
    engine.add_drafter(SuffixDrafter())
    engine.add_drafter(
        Eagle3Drafter(
            tiny_eagle3(model, parallel=True),
            engine.runner.view.module.get_input_embeddings(),
            slots=slots,
            capacity=engine.capacity_for(context, engine.max_nodes),
            dtype=dtype,
            rules=rules,
            taps=fixed_taps(engine.runner),
        )
    )
    engine.add_drafter(build_drafter("parallel", engine, DrafterParts()))
    engine.add_drafter(AdversarialDrafter(model.config.vocab_size, sampled=True))
    return engine


def full_engine(
    model: LlamaForCausalLM, *, rules: DraftRules | None = None, slots: int = 5, context: int = 200, **options
) -> RolloutEngine:
    """A float32 engine with every drafter that there is, by name."""
    engine = engine_for(model, slots=slots, context=context, rules=rules, **options)
    small = tiny_llama(model.config.vocab_size, seed=3, layers=2, sharpness=6.0)
    parts = DrafterParts(rules or DraftRules(), draft_model=small, composite_match=3, clasp_skipped=0.5)
    for name in DRAFTERS:
        if name not in engine.drafters and (
            name != "composite" or rules is None or rules.draw == "likeliest"
        ):
            engine.add_drafter(build_drafter(name, engine, parts))
    return engine


def forward_logprobs(
    model: torch.nn.Module, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """float32 [len(completion)], log-probs of a completion's tokens by a full forward of the model itself."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits / temperature, -1)[
        torch.arange(len(completion)), torch.tensor(completion)
    ]


def worst_gap(model: torch.nn.Module, rollouts: Iterable[Rollout], temperature: float = 1.0) -> float:
    """The largest difference between rollouts' log-probs and `forward_logprobs`."""
    gaps = [
        (forward_logprobs(model, r.request.prompt_ids, r.token_ids, temperature) - torch.tensor(r.logprobs))
        .abs()
        .max()
        for r in rollouts
    ]
    return float(max(gaps))
