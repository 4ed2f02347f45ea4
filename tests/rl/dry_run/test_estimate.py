"""What a dry run says a recipe takes: by rank and part, no more keys and values than fit, and hours."""

import dataclasses

import pytest

from paceline.rl.dry_run import description
from paceline.rl.dry_run.description import describe, size
from paceline.rl.dry_run.devices import DeviceSpec, published_gpu, this_machine
from paceline.rl.dry_run.estimate import KEYS_AND_VALUES, estimate, policy_config
from paceline.rl.memory.parts import cache_shape
from paceline.rl.recipe import load_config
from paceline.rollout.drafters.eagle3_model import parameter_count
from tests.engines import tiny_eagle3, tiny_llama
from tests.support import ROOT, train_here

SEVEN = ROOT / "configs" / "zero3_8gpu.yaml"
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
TINY = ROOT / "configs" / "tiny.yaml"
FAST = DeviceSpec("a fast device", 10**12, 1e15, 1e18, "given", "cuda")


def test_sizes_are_never_nothing():
    assert [size(n) for n in (80e9, 1.5e8, 2.5e6, 900)] == ["80.00 GB", "0.15 GB", "2.5 MB", "0.9 kB"]


def test_a_7b_policy_in_eighths_by_hand():
    """Qwen2.5-7B: 7,615,616,512 parameters (its model card), 28 layers with 4 key and value heads of 128."""
    config, parameters = load_config(SEVEN), 7_615_616_512
    found = estimate(config, policy_config(config.policy.model), 8, published_gpu(80))
    for what, of_each in (
        ("weights", 4),
        ("weights that DeepSpeed steps on", 4),
        ("gradients", 4),
        ("Adam's moments", 8),
    ):
        assert found.size(what) == of_each * parameters // 8
    assert found.size("engine's copy of the weights") == 2 * parameters
    tap = 4 * 3584 * 2
    assert cache_shape(config, policy_config(config.policy.model)).token_bytes == 2 * 28 * 4 * 128 * 2 + tap
    keys = next(part for part in found.parts if part.what == KEYS_AND_VALUES)
    assert keys.size == found.room < keys.whole and found.total == 80e9


def test_keys_and_values_take_what_is_free_or_what_they_want():
    config = load_config(SEVEN)
    policy = policy_config(config.policy.model)
    wanted = {
        gb: estimate(config, policy, 8, published_gpu(gb)).size(KEYS_AND_VALUES) for gb in (80, 141, 192, 400)
    }
    assert wanted[80] < wanted[141] < wanted[192] <= wanted[400]
    full = next(
        part.whole
        for part in estimate(config, policy, 8, published_gpu(400)).parts
        if part.what == KEYS_AND_VALUES
    )
    assert wanted[400] == full
    limited = load_config(SEVEN, ["rollout.kv_memory_gb=7"])
    assert estimate(limited, policy, 8, published_gpu(80)).size(KEYS_AND_VALUES) == 7_000_000_000


@pytest.mark.parametrize("overrides", [["scale.deepspeed=null", "scale.fsdp2=true"], []])
def test_more_ranks_leave_more_room(overrides):
    config = load_config(SEVEN, overrides)
    policy = policy_config(config.policy.model)
    rooms = [estimate(config, policy, ranks, published_gpu(80)).room for ranks in (4, 8, 16)]
    assert rooms[0] < rooms[1] < rooms[2]


def test_what_does_not_fit_is_said_and_what_to_write():
    said = describe(load_config(SEVEN), SEVEN, ranks=1, gpu=80)
    assert any(line.startswith("does not fit, by") and "more ranks" in line for line in said)
    said = describe(load_config(SEVEN), SEVEN, ranks=8, gpu=80)
    assert not [line for line in said if line.startswith(("write", "does not fit"))], (
        "the engine plans itself"
    )
    assert "not a multiple of 7 ranks" in " ".join(describe(load_config(SEVEN), SEVEN, ranks=7, gpu=80))
    assert "is not known" in describe(load_config(TINY), TINY, ranks=1, gpu=33)[-1]


def test_on_a_cpu_the_limit_to_write_is_said(monkeypatch):
    """There the engine takes what is free when it starts."""
    monkeypatch.setattr(
        description, "this_machine", lambda *_: dataclasses.replace(FAST, device="cpu", memory=80 * 10**9)
    )
    (advice,) = [
        line for line in describe(load_config(SEVEN), SEVEN, ranks=8) if line.startswith("write rollout.kv")
    ]
    taken = load_config(SEVEN, [advice.split()[1].rstrip(":")])
    assert not [
        line for line in describe(taken, SEVEN, ranks=8) if line.startswith(("write", "does not fit"))
    ]


def test_vllm_in_the_process_has_weights_and_a_cache_of_its_own(monkeypatch):
    base = ["speculation.drafters=[]", "measure.plain_every=0"]
    config = load_config(TINY, ["rollout.vllm={}", *base])
    policy = policy_config(config.policy.model)
    found = estimate(config, policy, 1, published_gpu(80))
    assert found.size("vLLM's weights") + found.size("vLLM's keys and values") == int(0.9 * 80e9)
    less = load_config(TINY, ["rollout.vllm={options: {gpu_memory_utilization: 0.5}}", *base])
    assert estimate(less, policy, 1, published_gpu(80)).size("vLLM's keys and values") < 0.5 * 80e9
    served = load_config(TINY, ["rollout.vllm={servers: ['http://a:1'], exchange: there}", *base])
    assert estimate(served, policy, 1, published_gpu(80)).size("vLLM's weights") == 0
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    here = dataclasses.replace(FAST, device="cpu")
    assert estimate(config, policy, 1, here).size("vLLM's keys and values") == 2 * 2**30


def test_seconds_by_hand():
    """32 sequences of 112 tokens on two ranks. Fast arithmetic: a token takes as long as reading the weights
    and the keys; slow arithmetic: 2 operations a weight and sequence, and 6 a weight and trained token."""
    config = load_config(QUICKSTART, ["speculation.drafters=[suffix]"])
    policy = policy_config(config.policy.model)
    parameters = 134_515_008
    reads = dataclasses.replace(FAST, bandwidth=1e9)
    found = estimate(config, policy, 2, reads)
    keys = 16 * (112 + 160) * 2 * 30 * 3 * 64 * 2
    assert found.rollout == pytest.approx(112 * (2 * parameters + keys) / 1e9)
    slow = estimate(config, policy, 2, dataclasses.replace(FAST, flops=1e9))
    assert slow.rollout == pytest.approx(112 * 16 * 2 * parameters / 1e9)
    assert slow.update == pytest.approx(6 * parameters * (16 * 112 + 2 * 160) / 1e9)
    assert estimate(config, policy, 1, dataclasses.replace(FAST, flops=1e9)).update == pytest.approx(
        2 * slow.update
    )


def test_ranks_of_one_machine_share_it(monkeypatch):
    policy = policy_config("tiny-llama")
    monkeypatch.setattr("paceline.rl.dry_run.devices.memory_limit", lambda: 10**10)
    monkeypatch.setattr("paceline.rl.dry_run.devices.torch.cuda.is_available", lambda: False)
    one, four = (this_machine(ranks, policy, __import__("torch").float32) for ranks in (1, 4))
    assert one.device == "cpu" and one.memory == 4 * four.memory == 10**10
    assert one.flops == pytest.approx(4 * four.flops) and one.bandwidth == pytest.approx(4 * four.bandwidth)


def test_the_command_takes_ranks_and_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(description, "this_machine", lambda *_: pytest.fail("timed though a GPU is named"))
    train_here(monkeypatch, str(TINY), "--dry-run", "--ranks", "4", "--gpu", "80")
    said = capsys.readouterr().out
    assert (
        "on 4 ranks" in said
        and "of 80.00 GB (A100 80 GB)" in said
        and "100 steps without speculation" in said
    )


def test_what_is_sharded_is_divided_by_the_ranks():
    """Table 1 of the ZeRO paper, with 16 bytes a parameter of which 4 are weights, 4 gradients and 8
    moments."""
    policy = policy_config("tiny-llama")
    trained = ("weights", "gradients", "Adam's moments")

    def size(*scale: str) -> int:
        found = estimate(load_config(TINY, scale), policy, 4, published_gpu(80))
        return sum(found.size(what) for what in trained)

    whole = size()
    for stage, share in enumerate((16, 4 + 4 + 8 / 4, 4 + 12 / 4, 16 / 4)):
        assert size(f"scale.deepspeed={ROOT}/configs/deepspeed/zero{stage}.json") == pytest.approx(
            whole * share / 16, abs=4
        )
    assert size("scale.fsdp2=true") == pytest.approx(whole / 4, abs=4)
    assert whole / 4 < size("scale.lora={rank: 1}") < whole / 2


def test_the_estimate_of_a_known_shape():
    """tiny-llama: its parameters counted by hand, and 16 bytes for each in training."""
    config = load_config(ROOT / "configs" / "tiny.yaml")
    attention, mlp = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 128
    parameters = 4 * (attention + mlp + 2 * 64) + 64
    policy = policy_config("tiny-llama")
    parameters += policy.vocab_size * 64 * (1 if policy.tie_word_embeddings else 2)
    found = estimate(config, policy, 2, published_gpu(80))
    assert [found.size(what) for what in ("weights", "gradients", "Adam's moments")] == [
        4 * parameters
    ] * 2 + [8 * parameters]
    assert found.size("reference policy") == 4 * parameters
    drafter = tiny_eagle3(tiny_llama())
    assert parameter_count(drafter.config) == sum(p.numel() for p in drafter.parameters())
