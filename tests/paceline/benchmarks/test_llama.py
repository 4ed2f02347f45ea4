"""llama.cpp decodes the policy that the engine decodes: the same weights, requests and threads."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.benchmarks.common.gguf_export import is_plain_llama, write_gguf
from paceline.benchmarks.common.peers import LLAMA_METHODS, LLAMA_PYTHON, Peers
from paceline.rl.errors import UserError
from paceline.rollout import Request, SamplingParams
from tests.engines import tiny_llama
from tests.support import ROOT

INTERPRETER = """#!{python}
import json, sys
if sys.argv[1] == "-c":
    sys.exit(print("9.9 AVX = 1"))
script, model, source, target = sys.argv[1:]
with open(model, "rb") as file:
    magic = file.read(4).decode()
with open(source) as file:
    work = json.load(file)
seen = {{"script": script, "magic": magic, "work": work}}
with open(target, "w") as file:
    json.dump({{"seconds": 2.0, "tokens": 7, "seen": seen}}, file)
"""


def requests(count, params):
    return [Request([1 + i, 2, 5], params, seed=i + (3 << 32)) for i in range(count)]


@pytest.fixture
def interpreter(tmp_path):
    path = tmp_path / "python"
    path.write_text(INTERPRETER.format(python=sys.executable))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(("weights", "precision"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_the_file_as_the_same_policy(tmp_path, weights, precision, tied):
    """Its reader has names and an order of rows of its own. Vectors are not rounded."""
    policy = tiny_llama()
    if tied:
        policy.lm_head.weight = policy.model.embed_tokens.weight
    with torch.no_grad():
        policy.model.norm.weight.normal_()
    write_gguf(policy, tmp_path / "policy.gguf", weights)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="policy.gguf", dtype=torch.float32)
    assert read.config.rms_norm_eps == pytest.approx(policy.config.rms_norm_eps)
    for key in ("rope_parameters", "num_key_value_heads", "head_dim", "max_position_embeddings"):
        assert getattr(read.config, key) == getattr(policy.config, key)
    parameters = dict(read.named_parameters())
    for name, value in policy.named_parameters():
        kept = value if value.dim() == 1 else value.to(precision).float()
        assert torch.equal(parameters.pop(name), kept), name
    assert not parameters


def test_llama_gets_the_requests_the_weights_and_the_threads(interpreter):
    timed = requests(2, SamplingParams(max_tokens=6, temperature=0.5, top_k=8))
    warm = requests(1, SamplingParams(max_tokens=3))
    peers = Peers(tiny_llama(), Path("unused"), None, interpreter)
    assert peers.llama_build() == "9.9 AVX = 1"
    assert list(peers.llama(timed, warm, repeats=4)) == [(method, 7, 2.0) for method in LLAMA_METHODS]
    seen = peers.run_llama(timed, warm, 4, "f16")["seen"]
    assert Path(seen["script"]).name == "llama_peer.py" and seen["magic"] == "GGUF"
    assert seen["work"] == {
        "slots": 1,
        "repeats": 4,
        "warm": [{"prompt": [1, 2, 5], "tokens": 3, "seed": 0}],
        "timed": [{"prompt": [1 + i, 2, 5], "tokens": 6, "seed": i} for i in range(2)],
        "sampling": {"temperature": 0.5, "top_k": 8, "top_p": 1.0},
        "threads": torch.get_num_threads(),
    }


def test_llama_is_left_out_without_an_environment_or_a_llama(interpreter):
    warm, other = requests(1, SamplingParams(max_tokens=3)), tiny_llama()
    other.config.attention_bias = True
    for peers in (Peers(tiny_llama(), Path(), None), Peers(other, Path(), None, interpreter)):
        assert peers.llama_build() is None
        assert list(peers.llama(warm, warm, 1)) == []


def test_plain_llamas_have_no_biases_and_no_scaled_positions():
    config = tiny_llama().config
    assert is_plain_llama(config)
    config.attention_bias = True
    assert not is_plain_llama(config)
    config.attention_bias, config.rope_parameters = False, {"rope_type": "linear", "factor": 2.0}
    assert not is_plain_llama(config)


def test_a_broken_environment_is_said_in_a_line(interpreter):
    interpreter.write_text(f"#!{sys.executable}\nraise SystemExit('No module named llama_cpp')\n")
    with pytest.raises(UserError, match=r"llama\.cpp failed in .*: No module named llama_cpp; .*peers-llama"):
        Peers(tiny_llama(), Path(), None, interpreter).llama_build()


@pytest.mark.skipif(not (ROOT / LLAMA_PYTHON).exists(), reason="needs llama.cpp: make peers-llama")
@pytest.mark.parametrize("weights", LLAMA_METHODS.values())
def test_llama_decodes_greedily_as_transformers_does(weights):
    policy = tiny_llama(sharpness=8.0).bfloat16().float()  # what both types of matrices hold exactly
    greedy = requests(6, SamplingParams(max_tokens=24, temperature=0.0))
    record = Peers(policy, Path(), None, ROOT / LLAMA_PYTHON).run_llama(greedy, greedy[:1], 1, weights)
    expected = [
        policy.generate(torch.tensor([r.prompt_ids]), max_new_tokens=24, do_sample=False, pad_token_id=0)[
            0, 3:
        ].tolist()
        for r in greedy
    ]
    assert record["tokens"] == 6 * 24
    same = sum(a == b for a, b in zip(record["completions"], expected, strict=True))
    assert same >= 5, json.dumps([record["completions"], expected])  # a near tie may fall either way
