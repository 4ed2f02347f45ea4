"""Writes a Llama policy to a GGUF file without a tokenizer, for llama.cpp as a peer in the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from transformers import PretrainedConfig, PreTrainedModel

_MATRICES = {
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
}


def is_plain_llama(config: PretrainedConfig) -> bool:
    """Returns whether a policy is a Llama without biases and scaled positions, which `write_gguf` knows."""
    biases = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    return bool(
        config.model_type == "llama" and config.rope_parameters["rope_type"] == "default" and not biases
    )


def write_gguf(policy: PreTrainedModel, file: Path, weights: str) -> None:
    """Writes a policy for which `is_plain_llama` holds.

    Args:
        policy: Policy with parameters on a CPU.
        file: File to write.
        weights: Type of its matrices, ``bf16`` or ``f16``; vectors are float32, as llama.cpp wants them.
    """
    matrix, file_type = _MATRICES[weights]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_file_type(file_type)
    _add_shape(writer, policy.config)
    for name, value in _tensors(policy):
        kept = gguf.GGMLQuantizationType.F32 if value.dim() == 1 else matrix
        writer.add_tensor(name, gguf.quants.quantize(value.numpy(), kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _tensors(policy: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields llama.cpp's names and float32 values of a policy's parameters.

    A tied output matrix is among them once, as the embedding: llama.cpp reads it as both.
    """
    config = policy.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in policy.named_parameters():
        value = parameter.detach().float()
        module = name.split(".")[-2]
        if module in heads:
            value = _with_neighbouring_pairs(value, heads[module])
        yield names[name.removesuffix(".weight")] + ".weight", value


def _with_neighbouring_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns the rows of a query or key matrix in llama.cpp's order.

    Rotary positions turn pairs of rows: in transformers row i of a head's first half and row i of its second
    half, in llama.cpp two neighbours.
    """
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
