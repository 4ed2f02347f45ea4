"""Drafter directories: written whole, read back, and refused with a reason."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from paceline.drafter_trainer.initialization import with_mask
from paceline.drafter_trainer.storage.checkpoint import DrafterError, load_drafter, save_drafter
from tests.engines import tiny_eagle3, tiny_llama


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
    assert (torch.arange(49) + tensors["d2t"])[tensors["t2d"][::2].nonzero()[:, 0]].tolist() == list(
        range(0, 97, 2)
    )
    expected = {
        "midlayer.hidden_norm.weight",
        "midlayer.input_layernorm.weight",
        "midlayer.post_attention_layernorm.weight",
    }
    assert expected | {"norm.weight", "midlayer.mlp.gate_proj.weight"} <= set(tensors)


def test_drafts_in_one_pass_have_the_format_that_vllm_loads(tmp_path):
    """`mask_hidden` goes through ``fc``, and ``ptd_token_id`` names the token that is read with it."""
    drafter = tiny_eagle3(tiny_llama(), parallel=True)
    save_drafter(drafter, tmp_path / "d", torch.float32)
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["ptd_token_id"] == drafter.mask_token == 0
    assert load_file(tmp_path / "d" / "model.safetensors")["mask_hidden"].shape == (1, 192)
    again = load_drafter(tmp_path / "d", 97, 64)
    assert torch.equal(again.mask_hidden, drafter.mask_hidden)
    for wrong in (97, -1, True, "end"):
        (tmp_path / "d" / "config.json").write_text(json.dumps(config | {"ptd_token_id": wrong}))
        with pytest.raises(DrafterError, match=r"ptd_token_id is .* write a token id below vocab_size, 97"):
            load_drafter(tmp_path / "d", 97, 64)
    (tmp_path / "d" / "config.json").write_text(json.dumps(config | {"ptd_token_id": None}))
    with pytest.raises(DrafterError, match=r"unexpected .'mask_hidden'."):
        load_drafter(tmp_path / "d", 97, 64)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_mask_is_added_or_removed_and_the_rest_stays(wanted):
    target = tiny_llama()
    drafter = tiny_eagle3(target, parallel=not wanted)
    other = with_mask(drafter, wanted, target.config, seed=3)
    assert (other.mask_token is not None) == wanted
    assert with_mask(other, wanted, target.config, seed=3) is other
    shared = drafter.state_dict().keys() & other.state_dict().keys()
    assert shared ^ drafter.state_dict().keys() <= {"mask_hidden"}
    assert all(torch.equal(drafter.state_dict()[name], other.state_dict()[name]) for name in shared)
    if wanted:  # on every rank alike
        assert torch.equal(other.mask_hidden, with_mask(drafter, True, target.config, seed=3).mask_hidden)
        assert float(other.mask_hidden.detach().std()) > 0


def test_a_replacement_that_is_cut_short_leaves_no_half_drafter(saved, monkeypatch):
    """As when the process is killed after the first file of the old one."""
    drafter, path = saved

    def cut_short(folder, ignore_errors=False):
        for file in sorted(Path(folder).glob("*"))[:1]:
            file.unlink()
            raise SystemExit

    monkeypatch.setattr(shutil, "rmtree", cut_short)
    with pytest.raises(SystemExit):
        save_drafter(drafter, path, torch.float32)
    assert not path.exists()


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


def test_what_other_writers_leave_out_is_filled_in(saved):
    """Layers under ``eagle_config``, a flat ``rope_theta``, no head dimension: as SpecForge and the first
    checkpoints have it.
    """
    drafter, path = saved
    config = json.loads((path / "config.json").read_text())
    for key in ("rope_parameters", "head_dim"):
        del config[key]
    config["eagle_config"] = {
        "eagle_aux_hidden_state_layer_ids": config.pop("eagle_aux_hidden_state_layer_ids")
    }
    config["rope_theta"] = 5000.0
    (path / "config.json").write_text(json.dumps(config))
    again = load_drafter(path, 97, 64)
    assert again.config.eagle_aux_hidden_state_layer_ids == drafter.config.eagle_aux_hidden_state_layer_ids
    assert again.config.rope_parameters["rope_theta"] == 5000.0


def test_safetensors_say_that_they_are_torchs(saved):
    with safe_open(saved[1] / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


CONFIGS = {
    "a list": ([], "holds a list"),
    "no layers": (
        {"eagle_aux_hidden_state_layer_ids": None},
        "eagle_aux_hidden_state_layer_ids is None; write the three layers",
    ),
    "layers as text": ({"eagle_aux_hidden_state_layer_ids": ["1", "2", "3"]}, "write the three layers"),
    "two layers": ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, "write the three layers"),
    "no draft vocabulary": (
        {"draft_vocab_size": None},
        "draft_vocab_size is None; write a whole number above 0",
    ),
    "a draft vocabulary of text": ({"draft_vocab_size": "49"}, "draft_vocab_size is '49'"),
    "a draft vocabulary that is true": ({"draft_vocab_size": True}, "draft_vocab_size is True"),
    "a large draft vocabulary": (
        {"draft_vocab_size": 98},
        "draft_vocab_size is 98; write at most vocab_size, 97",
    ),
    "a negative width": ({"hidden_size": -64}, "hidden_size is -64"),
    "a huge layer": ({"intermediate_size": 2**30}, "its config says"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
    "an odd head": ({"head_dim": 15}, "head_dim even"),
    "more layers": ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
    "an epsilon of text": ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
    "rope as text": ({"rope_parameters": "default"}, "rope_parameters is 'default'"),
    "rope that changes with length": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_type default",
    ),
    "rope without a base": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
        "rope_theta is None",
    ),
    "scaled rope": ({"rope_parameters": None, "rope_scaling": {"type": "yarn"}}, "rope_scaling is set"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only drafters with silu"),
    "half a head that turns": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "rope_parameters is",
    ),
    "biases": ({"attention_bias": True}, "attention_bias is True"),
    "a variant of the layer": ({"norm_before_residual": True}, "norm_before_residual is True"),
    "another width of the target": ({"target_hidden_size": 128}, "target_hidden_size is 128"),
    "another architecture": ({"architectures": "LlamaForCausalLMEagle3"}, "architectures is"),
    "a key that transformers refuses": ({"attention_dropout": "much"}, "config.json"),
}


@pytest.mark.parametrize("changed, said", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_cannot_be_is_one_line(saved, changed, said):
    _, path = saved
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(changed if isinstance(changed, list) else {**config, **changed})
    )
    with pytest.raises(DrafterError) as found:
        load_drafter(path, 97, 64)
    assert said in str(found.value) and "\n" not in str(found.value) and str(path) in str(found.value)


WEIGHTS = {
    "a missing tensor": (lambda t: t.pop("fc.weight"), "missing ['fc.weight']"),
    "a surplus tensor": (
        lambda t: t.update({"embed_tokens.weight": torch.zeros(97, 64)}),
        "unexpected ['embed_tokens.weight']",
    ),
    "a wrong shape": (
        lambda t: t.update({"norm.weight": torch.ones(65)}),
        "norm.weight has the shape (65,), its config says",
    ),
    "a transposed matrix": (
        lambda t: t.update({"fc.weight": t["fc.weight"].T.contiguous()}),
        "fc.weight has the shape (192, 64)",
    ),
    "NaN": (lambda t: t["fc.weight"].fill_(float("nan")), "fc.weight has NaN or infinite values"),
    "infinity": (
        lambda t: t["norm.weight"].__setitem__(3, float("inf")),
        "norm.weight has NaN or infinite values",
    ),
    "whole numbers": (
        lambda t: t.update({"norm.weight": torch.ones(64, dtype=torch.int64)}),
        "norm.weight is torch.int64",
    ),
    "eight bits": (
        lambda t: t.update({"norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}),
        "norm.weight is torch.float8",
    ),
    "no vocabulary": (lambda t: t.pop("d2t"), "missing ['d2t']"),
    "a float vocabulary": (lambda t: t.update({"d2t": t["d2t"].float()}), "d2t is torch.float32"),
    "tokens beyond the vocabulary": (lambda t: t["d2t"].__setitem__(-1, 97), "increasing token ids below 97"),
    "tokens below zero": (lambda t: t["d2t"].__setitem__(0, -5), "increasing token ids below 97"),
    "tokens out of order": (lambda t: t["d2t"].__setitem__(2, -2), "increasing token ids below 97"),
    "another mask": (lambda t: t["t2d"].fill_(True), "t2d marks other tokens"),
}


@pytest.mark.parametrize("change, said", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_cannot_be_are_one_line(saved, change, said):
    _, path = saved
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(DrafterError) as found:
        load_drafter(path, 97, 64)
    assert said in str(found.value) and "\n" not in str(found.value)


def test_layers_and_vocabulary_of_another_recipe_say_what_to_write(saved):
    _, path = saved
    with pytest.raises(
        DrafterError,
        match=r"layers \[1, 2, 2\], the engine keeps those of \[0, 1, 2\]; write drafter.tap_layers",
    ):
        load_drafter(path, 97, 64, tap_layers=(0, 1, 2))
    with pytest.raises(DrafterError, match=r"drafts 49 tokens, .* is 64; write drafter.draft_vocab_size: 49"):
        load_drafter(path, 97, 64, draft_vocab_size=64)
    load_drafter(path, 97, 64, tap_layers=(1, 2, 2), draft_vocab_size=49)


def test_files_broken_at_random_are_read_or_refused_in_a_line(saved):
    """Bytes changed, cut off, doubled: in the config, and in the weights' header."""
    _, path = saved
    draw, refused = random.Random(0), 0
    whole = {name: (path / name).read_bytes() for name in ("config.json", "model.safetensors")}
    for _ in range(120):
        name = draw.choice(list(whole))
        data = bytearray(whole[name])
        reach = min(len(data), 1500)
        match draw.randrange(4):
            case 0:
                data[draw.randrange(reach)] = draw.randrange(256)
            case 1:
                del data[draw.randrange(len(data)) :]
            case 2:
                at = draw.randrange(reach)
                data[at:at] = data[at : at + draw.randrange(1, 40)]
            case 3:
                data = bytearray()
        (path / name).write_bytes(data)
        try:
            load_drafter(path, 97, 64)
        except DrafterError as error:
            refused += 1
            assert "\n" not in str(error)
        (path / name).write_bytes(whole[name])
    assert refused > 60
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").mkdir()
    with pytest.raises(DrafterError, match="missing"):
        load_drafter(path, 97, 64)
    with pytest.raises(DrafterError, match="missing"):
        load_drafter(path / "config.json", 97, 64)
