"""Drafter directories: written whole, read back, and refused with a reason."""

import json

import pytest
import torch
from safetensors.torch import load_file

from drafter_trainer.checkpoint import DrafterError, load_drafter, save_drafter
from tests.support import tiny_eagle3, tiny_llama


@pytest.fixture
def saved(tmp_path):
    drafter = tiny_eagle3(tiny_llama())
    save_drafter(drafter, tmp_path / "d", torch.float32)
    return drafter, tmp_path / "d"


def test_round_trip(saved):
    drafter, path = saved
    again = load_drafter(path, 97, 64)
    for (name, a), (_, b) in zip(drafter.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(again.vocabulary, torch.arange(0, 97, 2))


def test_format_is_what_servers_load(saved):
    """Names, shapes and keys of `LlamaForCausalLMEagle3`."""
    _, path = saved
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["model_type"] == "llama"
    assert config["draft_vocab_size"] == 49
    assert len(config["eagle_aux_hidden_state_layer_ids"]) == 3
    assert config["num_hidden_layers"] == 1
    tensors = load_file(path / "model.safetensors")
    assert tensors["fc.weight"].shape == (64, 3 * 64)
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (64, 2 * 64)
    assert tensors["midlayer.self_attn.k_proj.weight"].shape == (32, 2 * 64)
    assert tensors["lm_head.weight"].shape == (49, 64)
    assert tensors["d2t"].shape == (49,) and tensors["t2d"].shape == (97,)
    assert (torch.arange(49) + tensors["d2t"])[tensors["t2d"][::2].nonzero()[:, 0]].tolist() == list(range(0, 97, 2))
    expected = {"midlayer.hidden_norm.weight", "midlayer.input_layernorm.weight", "midlayer.post_attention_layernorm.weight"}
    assert expected | {"norm.weight", "midlayer.mlp.gate_proj.weight"} <= set(tensors)


def test_replacing_keeps_one_whole_directory(saved):
    drafter, path = saved
    save_drafter(drafter, path, torch.bfloat16)
    assert load_file(path / "model.safetensors")["fc.weight"].dtype == torch.bfloat16
    assert [p.name for p in path.parent.iterdir()] == ["d"]


def test_truncated_weights(saved):
    _, path = saved
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(DrafterError, match=r"model\.safetensors: truncated"):
        load_drafter(path, 97, 64)


def test_missing_weights_and_config(saved):
    _, path = saved
    (path / "model.safetensors").unlink()
    with pytest.raises(DrafterError, match=r"model\.safetensors: missing"):
        load_drafter(path, 97, 64)
    (path / "config.json").write_text("{")
    with pytest.raises(DrafterError, match="not JSON"):
        load_drafter(path, 97, 64)
    (path / "config.json").unlink()
    with pytest.raises(DrafterError, match=r"config\.json: missing"):
        load_drafter(path, 97, 64)


def test_wrong_vocabulary_width_or_architecture(saved):
    _, path = saved
    with pytest.raises(DrafterError, match="made for 97 tokens, the policy has 100"):
        load_drafter(path, 100, 64)
    with pytest.raises(DrafterError, match="64 wide, the policy 128"):
        load_drafter(path, 97, 128)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(DrafterError, match="architectures"):
        load_drafter(path, 97, 64)
