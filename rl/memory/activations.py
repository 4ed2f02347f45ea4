"""Bytes of the activations of an update and of the drafter's training."""

from __future__ import annotations

import math

import torch
from transformers import LlamaConfig, PreTrainedConfig

from paceline.drafter_trainer.objective.draft_objective import Objective
from paceline.drafter_trainer.objective.parallel_drafts import retained_shares
from paceline.drafter_trainer.trace_buffer import LONGEST_PIECE
from paceline.rl.config.run import RunConfig
from paceline.rollout.drafters.eagle3_model import SINKS, attention_shape
from paceline.rollout.model.shape import intermediate_size, key_shape

_LOGITS = 1 << 27  # that a GPU's head works on at a time
_CPU_LOGITS = 1 << 23


def head_rows(vocabulary: int, device: torch.device) -> int:
    """Returns the number of tokens that the output head works on at a time, which bounds its memory.

    On a GPU each piece costs one more sum over the gradient of the head's weights.
    """
    return max((_CPU_LOGITS if device.type == "cpu" else _LOGITS) // vocabulary, 1)


def update_activations(config: RunConfig, policy: PreTrainedConfig) -> int:
    """Returns the bytes of a micro-batch's activations on a GPU, as autograd keeps them.

    The residual stream is float32. A norm keeps its input and its normalised input in float32, and the next
    product its output in the products' precision. Attention keeps queries, keys, values and its output,
    without scores, and the MLP its gate, activated gate, other factor and their product. With activation
    checkpointing all this exists for one layer at a time, beside the input of each. The output head works on
    some tokens at a time, with two float32 matrices of their logits, and adds a gradient of its weights.

    Args:
        config: The recipe.
        policy: The policy's configuration.
    """
    text, keys, tokens = policy.get_text_config(), key_shape(policy), config.update.tokens_per_microbatch
    width = 2 if config.policy.mixed_precision == "bf16" else 4
    hidden, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    norms = 2 * (2 * 4 + width) * hidden
    attention = width * 2 * (text.num_attention_heads + keys.kv_heads) * keys.head_dim
    layer = norms + attention + width * 4 * intermediate_size(text)
    kept = layer + layers * 4 * hidden if config.policy.gradient_checkpointing else layers * layer
    rows = min(head_rows(vocabulary, torch.device("cuda")), tokens)
    head = vocabulary * (rows * 2 * (width + 4) + hidden * (2 * width + 4))
    return tokens * kept + head


def drafter_activations(config: RunConfig, shape: LlamaConfig) -> int:
    """Returns the bytes of a micro-batch's activations on a GPU while the drafter trains, in float32.

    Each draft position keeps its probabilities of the draft vocabulary in three forms for the loss, beside
    one layer's activations of 17 values for each hidden unit. The batch itself holds taps and the teacher's
    probabilities; a token of left context has taps and 7 values for each hidden unit. Completions are assumed
    to be half as long as they may be. In 16 bits, flash attention keeps no scores; in float32, each position
    keeps its attention weights within pieces, and three more matrices of scores exist while one is computed.

    Args:
        config: The recipe.
        shape: The drafter's configuration.
    """
    d, tokens = config.drafter, config.drafter.tokens_per_microbatch
    heads, _, _ = attention_shape(shape)
    hidden, taps = shape.hidden_size, len(shape.eagle_aux_hidden_state_layer_ids)
    # anchors at all positions, for each anchor of the batch
    positions = d.unroll + sum(retained_shares(Objective(parallel=d.parallel_positions)))
    of_token = positions * (3 * shape.draft_vocab_size + 17 * hidden) + shape.draft_vocab_size + taps * hidden
    piece = min(tokens, LONGEST_PIECE, -(-config.rollout.max_tokens // 2))
    context = min(d.context_tokens + SINKS, config.rollout.max_context) if d.context_tokens else 0
    of_contexts = -(-tokens // piece) * context * (taps + 7) * hidden
    mixed = config.policy.mixed_precision == "bf16"
    scores = 0 if mixed else (positions + 3) * heads * tokens * (piece + context)
    return math.ceil(4 * (tokens * of_token + of_contexts + scores))
