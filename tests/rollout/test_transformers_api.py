"""The engine under releases of transformers that call things by other names, hand over other things, or
compute otherwise.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import Cache, DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from paceline.rollout import Request, RolloutEngine, SamplingParams
from paceline.rollout.model.fused_layer import FusedLayer
from paceline.rollout.model.view_check import UnfusedWarning
from paceline.rollout.transformers_api import cache_argument
from tests.engines import tiny_llama

REQUESTS = [Request([5, 6, 7, 8 + i], SamplingParams(temperature=0, max_tokens=12)) for i in range(3)]


def build(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> RolloutEngine:
    return RolloutEngine(model, dtype=dtype, max_slots=2, max_context=64)


def greedy(engine: RolloutEngine) -> list[list[int]]:
    return [r.token_ids for r in engine.generate(REQUESTS)]


def as_class(
    model: LlamaForCausalLM, whole: type, decoder: type = LlamaModel, layer: type = LlamaDecoderLayer
) -> torch.nn.Module:
    """The model with modules of other classes: what another release would have loaded from the same
    weights."""
    model.__class__, model.model.__class__ = whole, decoder
    for each in model.model.layers:
        each.__class__ = layer
    return model


def old_names(module: torch.nn.Module, cache: Cache | None) -> dict[str, Cache | None]:
    return {cache_argument(type(module).__mro__[1].forward): cache}


class RenamedLayer(LlamaDecoderLayer):
    """Takes everything by keywords that no release has."""

    def forward(self, *, states, memory, turn, **others):
        return super().forward(states, position_embeddings=turn, **old_names(self, memory), **others)


class RenamedModel(LlamaModel):
    def forward(self, input_ids=None, position_ids=None, memory=None, use_cache=None, **through):
        hidden = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        turn = self.rotary_emb(hidden, position_ids=position_ids)
        for layer in self.layers:
            hidden = layer(states=hidden, turn=turn, position_ids=position_ids, memory=memory, **through)
        return self.norm(hidden)


class RenamedLM(LlamaForCausalLM):
    def forward(
        self,
        input_ids=None,
        position_ids=None,
        memory: Cache | None = None,
        use_cache=None,
        logits_to_keep=0,
        **through,
    ):
        if not use_cache:  # attention without a cache needs the causal mask that this stand-in does not make
            through["attention_mask"] = torch.full([input_ids.shape[1]] * 2, float("-inf")).triu(1)[
                None, None
            ]
        hidden = self.model(input_ids, position_ids, memory, **through)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return SimpleNamespace(logits=self.lm_head(hidden[:, kept]))


def test_a_layer_takes_the_cache_under_any_name():
    wanted = greedy(build(tiny_llama(sharpness=8.0)))
    engine = build(as_class(tiny_llama(sharpness=8.0), RenamedLM, RenamedModel, RenamedLayer))
    assert len(engine.runner.view.fused) == 4
    assert greedy(engine) == wanted


class SlowGrowth(LlamaDecoderLayer):
    """Computes something that no part of it shows: each layer adds its own number to what it gives."""

    extra = 0.0

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) + self.extra


def test_layers_that_compute_otherwise_are_not_fused():
    """All layers of a kind are fused on the word of the first; here the others differ from it."""
    model = as_class(tiny_llama(sharpness=8.0), LlamaForCausalLM, layer=SlowGrowth)
    for index, layer in enumerate(model.model.layers):
        layer.extra = 0.3 * index
    with pytest.warns(UnfusedWarning, match=r"without fused layers.*logits differ from transformers' own"):
        engine = build(model)
    assert not engine.runner.view.fused
    prompt = torch.tensor([REQUESTS[0].prompt_ids])
    wanted = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
    )[0, 4:].tolist()
    assert greedy(engine)[0] == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_layer_that_breaks_is_replaced_by_the_original(monkeypatch, dtype):
    wanted = greedy(build(tiny_llama(sharpness=8.0), dtype))

    def broken(self, *args, **kwargs):
        raise TypeError("forward() got an unexpected keyword argument 'states'")

    monkeypatch.setattr(FusedLayer, "forward", broken)
    with pytest.warns(UnfusedWarning, match="unexpected keyword argument 'states'"):
        engine = build(tiny_llama(sharpness=8.0), dtype)
    monkeypatch.undo()
    if dtype == torch.float32:
        assert greedy(engine) == wanted
    assert not engine.runner.view.fused


class Forgetful(LlamaModel):
    """A release whose models hand no keyword arguments of the caller's to their layers."""

    def forward(self, *args, forward_batch=None, seen_attention=None, **kwargs):
        return super().forward(*args, **kwargs)


class Shortsighted(LlamaModel):
    """A release that stores keys and values in a cache of its own."""

    def forward(self, *args, **kwargs):
        names = [name for name, value in kwargs.items() if isinstance(value, Cache)]
        return super().forward(*args, **{**kwargs, **dict.fromkeys(names, DynamicCache())})


@pytest.mark.parametrize(("decoder", "reason"), [(Forgetful, "TypeError"), (Shortsighted, "")])
def test_a_model_that_the_engine_gets_wrong_is_refused_in_a_line(decoder, reason):
    with pytest.raises(
        ValueError, match=rf"does not run in the engine with transformers \d+\.\d+.*{reason}.*install"
    ) as caught:
        build(as_class(tiny_llama(), LlamaForCausalLM, decoder))
    assert "\n" not in str(caught.value)


def test_the_view_is_compared_in_each_precision(monkeypatch):
    """A wrong final norm shows in bfloat16, too, where a hundred times as much is left to rounding."""
    from paceline.rollout.model import view_check

    original = view_check.InferenceView

    def broken(*args, **kwargs):
        view = original(*args, **kwargs)
        view.module.model.norm.weight = torch.nn.Parameter(
            view.module.model.norm.weight.detach().clone().flip(0) * 3
        )
        view.module.model.norm.weight.data[:32] = 0
        return view

    monkeypatch.setattr(view_check, "InferenceView", broken)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match="logits differ"):
            build(tiny_llama(), dtype)


def test_a_view_that_gives_nan_is_refused(monkeypatch):
    """In the second of its two forwards only, which reads what the first has stored."""
    from paceline.rollout.model import view_check

    original = view_check.run_causal_lm

    def poisoned(*args, **kwargs):
        logits = original(*args, **kwargs)
        return logits * float("nan") if logits.shape[1] in (2, 4) else logits

    monkeypatch.setattr(view_check, "run_causal_lm", poisoned)
    with pytest.raises(ValueError, match="by inf of their norm"):
        build(tiny_llama())


def test_weights_that_are_not_finite_are_no_reason_to_refuse():
    """A request fails for them, not the engine: `tests/rollout/engine/test_request_validation.py`."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    assert build(model).runner.view.fused
