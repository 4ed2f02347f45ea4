"""Where policies come from."""

import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl import policies
from rl.errors import UserError
from rl.prompts import encode_prompt, stop_token_ids
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


def test_bad_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "_from_hub", lambda model: None)
    with pytest.raises(UserError, match="hub does not have it or is not reachable"):
        policies.fetch_policy("nobody/nothing")
    with pytest.raises(UserError, match=r"no config\.json"):
        policies.fetch_policy(str(tmp_path))


def test_truncated_weights_are_one_line(tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(policies.fetch_policy("tiny-llama"), path)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be loaded") as error:
        policies.load_policy(path)
    assert "\n" not in str(error.value)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        policies.load_policy(path)


def test_a_broken_download_is_refused(tmp_path):
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(UserError, match=r"has 104 bytes and SHA-256"):
        policies.convert_gguf(gguf, tmp_path / "out")


def test_chat_template_is_used_where_there_is_one():
    tokenizer = AutoTokenizer.from_pretrained(policies.fetch_policy("tiny-llama"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}>"
    assert tokenizer.decode(encode_prompt(tokenizer, "hi", "be kind")) == "system:be kind\nuser:hi\n>"
    assert tokenizer.decode(encode_prompt(tokenizer, "hi", None)) == "user:hi\n>"


def test_a_policy_that_the_engine_refuses_is_a_line(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("Model does not run in the engine with transformers 9.0")

    monkeypatch.setattr("rl.rollouts.RolloutEngine", refuse)
    refused = pytest.raises(UserError, match=r"^policy.model: Model does not run in the engine with transformers 9.0$")
    with refused, tiny_trainer(tmp_path, monkeypatch, "[0.0 for _ in completions]"):
        pass
