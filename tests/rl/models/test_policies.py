"""Where policies come from."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from paceline.rl.errors import UserError
from paceline.rl.models import loading, policies, smollm2
from paceline.rl.tasks.prompts import encode_prompt, stop_token_ids
from tests.engines import tiny_llama
from tests.support import tiny_trainer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))


def test_tiny_llama_is_made_once_and_round_trips_text():
    path = policies.fetch_policy("tiny-llama")
    assert policies.fetch_policy("tiny-llama") == path
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = encode_prompt(tokenizer, "4 + 5 = 9\nAnswer: 9", system="ignored without a template")
    assert tokenizer.decode(ids) == "4 + 5 = 9\nAnswer: 9\n"
    model = AutoModelForCausalLM.from_pretrained(path)
    assert stop_token_ids(tokenizer, model.generation_config) == (1,)
    assert policies.fetch_policy(str(path)) == path


def test_bad_ids(tmp_path):
    with pytest.raises(
        UserError, match="the Hugging Face hub is not reachable and its cache does not hold it"
    ):
        policies.fetch_policy("nobody/nothing")
    with pytest.raises(UserError, match=r"no config\.json"):
        policies.fetch_policy(str(tmp_path))


def test_truncated_weights_are_one_line(tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(policies.fetch_policy("tiny-llama"), path)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be loaded") as error:
        loading.load_policy(path)
    assert "\n" not in str(error.value)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        loading.load_policy(path)


def broken(tmp_path: Path) -> Path:
    """A copy of the tiny policy, to be spoilt."""
    return Path(shutil.copytree(policies.fetch_policy("tiny-llama"), tmp_path / "copy"))


def test_missing_and_surplus_weights_are_named(tmp_path):
    path = broken(tmp_path)
    weights = load_file(path / "model.safetensors")
    save_file(
        {f"base_model.model.{name}": w for name, w in weights.items()},
        path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        UserError, match=r"lacks \d+ of the model's weights \(.*embed_tokens.*and has \d+ that are not"
    ) as caught:
        loading.load_policy(path)
    assert "\n" not in str(caught.value)
    fewer = {name: w for name, w in weights.items() if "layers.2.mlp.up_proj" not in name}
    save_file(fewer, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"lacks 1 of the model's weights \(model.layers.2.mlp.up_proj.weight\): it would"
    ):
        loading.load_policy(path)
    save_file({**weights, "v_head.weight": torch.zeros(1, 64)}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"has 1 that are not the model's \(v_head.weight\)"):
        loading.load_policy(path)
    old = {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    save_file({n: w.contiguous() for n, w in old.items()}, path / "model.safetensors", {"format": "pt"})
    loading.load_policy(path)  # a buffer that old releases saved; and lm_head, which is tied, is in no file


def remove_config(path: Path) -> None:
    (path / "config.json").unlink()


def empty_config(path: Path) -> None:
    (path / "config.json").write_text("")


def list_config(path: Path) -> None:
    (path / "config.json").write_text("[]")


def changed_config(**values):
    def change(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def empty_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def pickled_weights(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def lost_shard(path: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def with_adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text("{}")


def adapter_alone(path: Path) -> None:
    with_adapter(path)
    remove_config(path)


BROKEN = [
    (remove_config, r"no config\.json"),
    (empty_config, r"config\.json is not JSON"),
    (list_config, "holds no JSON object"),
    (changed_config(model_type="t5", is_encoder_decoder=True), "t5 has an encoder"),
    (changed_config(model_type="qwen9"), "no causal language model of model_type 'qwen9'"),
    (
        changed_config(model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Mine"}),
        "brings code of its own",
    ),
    (changed_config(hidden_size="wide"), "cannot be loaded|is wrong"),
    (changed_config(hidden_size=32), "cannot be loaded"),
    (empty_weights, r"model\.safetensors is empty"),
    (no_weights, r"no \*\.safetensors"),
    (pickled_weights, r"pytorch_model\.bin is pickled"),
    (lost_shard, "model-00002-of-00002.safetensors of its index"),
    (with_adapter, "holds a base model and a peft adapter"),
    (adapter_alone, "holds adapters of an unnamed policy"),
]


@pytest.mark.parametrize(("spoil", "reason"), BROKEN, ids=[reason for _, reason in BROKEN])
def test_a_broken_directory_is_one_line(tmp_path, spoil, reason):
    path = broken(tmp_path)
    spoil(path)
    with pytest.raises(UserError, match=reason) as caught:
        loading.load_policy(policies.fetch_policy(str(path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "{}"])
def test_a_directory_without_a_tokenizer_is_one_line(tmp_path, content):
    path = broken(tmp_path)
    for file in path.glob("token*"):
        file.unlink() if content is None else file.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer") as caught:
        loading.load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_a_broken_download_is_refused(tmp_path):
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(UserError, match=r"has 104 bytes and SHA-256"):
        smollm2.convert_gguf(gguf, tmp_path / "out")


def test_a_conversion_shows_no_bar_of_its_own(tmp_path, monkeypatch, capsys):
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    made = tiny_llama()
    made.config.quantization_config = {}

    def convert(*args, **kwargs):
        print("Converting tensors:   0%", file=sys.stderr)
        return made

    monkeypatch.setattr(smollm2, "_GGUF_BYTES", 4)
    monkeypatch.setattr(smollm2, "_GGUF_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    monkeypatch.setattr(smollm2, "_PARAMETERS", sum(p.numel() for p in made.parameters()))
    monkeypatch.setattr(smollm2.AutoModelForCausalLM, "from_pretrained", convert)
    tokenizer = SimpleNamespace(save_pretrained=lambda target: None)
    monkeypatch.setattr(smollm2.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    smollm2.convert_gguf(gguf, tmp_path / "out")
    assert "Converting" not in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_chat_template_is_used_where_there_is_one():
    tokenizer = AutoTokenizer.from_pretrained(policies.fetch_policy("tiny-llama"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}>"
    assert tokenizer.decode(encode_prompt(tokenizer, "hi", "be kind")) == "system:be kind\nuser:hi\n>"
    assert tokenizer.decode(encode_prompt(tokenizer, "hi", None)) == "user:hi\n>"


def test_a_policy_that_the_engine_refuses_is_a_line(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("Model does not run in the engine with transformers 9.0")

    monkeypatch.setattr("paceline.rl.generation.policy_engine.RolloutEngine", refuse)
    refused = pytest.raises(
        UserError, match=r"^policy.model: Model does not run in the engine with transformers 9.0$"
    )
    with refused, tiny_trainer(tmp_path, monkeypatch, "[0.0 for _ in completions]"):
        pass
