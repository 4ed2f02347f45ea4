"""vLLM in the process: what it draws is the policy's, under new weights too, whatever drafts
(``make test-vllm``).
"""

import itertools

import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import chisquare

pytest.importorskip("vllm")

from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from paceline.drafter_trainer.storage.checkpoint import save_drafter
from paceline.rollout import FinishReason, Request, SamplingParams, mean_acceptance_length
from paceline.rollout.backends.adaptive.draft_watchdog import Mode
from paceline.rollout.backends.vllm_engine import VllmEngine
from paceline.rollout.drafters.eagle3_model import Eagle3Model
from paceline.rollout.strategy import PLAIN, Strategy
from tests.engines import tiny_eagle3, tiny_llama, worst_gap

pytestmark = pytest.mark.vllm
VOCAB = 64


@pytest.fixture(scope="module")
def policy():
    # heads of 64, which vLLM has CPU kernels for
    return tiny_llama(VOCAB, layers=8, sharpness=8.0, hidden=256)


@pytest.fixture(scope="module")
def served(policy, tmp_path_factory):
    """One engine for all tests: starting vLLM takes seconds."""
    folder = tmp_path_factory.mktemp("vllm")
    policy.save_pretrained(folder / "policy")
    save_drafter(tiny_eagle3(policy), folder / "drafter", torch.float32)
    options = {
        "enforce_eager": True,
        "gpu_memory_utilization": 0.5,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    engine = VllmEngine(
        folder / "policy",
        dtype="float32",
        max_slots=16,
        max_context=256,
        drafter=folder / "drafter",
        depth=3,
        options=options,
    )
    yield engine, folder
    engine.close()


def requests(count, tokens, temperature=1.0, **options):
    params = SamplingParams(max_tokens=tokens, temperature=temperature, **options)
    return [Request([1 + i % 7, 5, 6, 7], params, seed=i, group=i % 7) for i in range(count)]


def test_logprobs_are_the_policys(policy, served):
    engine, _ = served
    asked = requests(8, 24, temperature=0.7)
    rollouts = engine.generate(asked)
    assert [r.request for r in rollouts] == asked
    assert all(r.finish_reason is FinishReason.LENGTH and len(r.token_ids) == 24 for r in rollouts)
    assert worst_gap(policy, rollouts, 0.7) < 2e-3
    assert engine.records
    assert sum(r.committed for r in engine.records) <= 8 * 24


def always_draft(engine, depth, monkeypatch):
    """Fixes the depth: neither the bandit nor the watchdog has a say."""
    arm = Strategy("eagle3", depth) if depth else PLAIN
    monkeypatch.setattr(engine.control.selector, "choose", lambda active, context, explore: arm)
    monkeypatch.setattr(engine.control.watchdog, "mode", lambda now: Mode.ON)


def silent_drafter(policy, vocabulary):
    """A drafter with a head of zeros, which always drafts the first token of its vocabulary."""
    drafter = tiny_eagle3(policy)
    drafter = Eagle3Model(drafter.config, torch.tensor(vocabulary))
    with torch.no_grad():
        drafter.lm_head.weight.zero_()
    return drafter


def test_drafts_change_no_greedy_token(policy, served, monkeypatch):
    """A good drafter, a useless one, and none."""
    engine, folder = served
    asked = requests(6, 32, temperature=0.0)
    always_draft(engine, 3, monkeypatch)
    found = [[r.token_ids for r in engine.generate(asked)]]
    save_drafter(silent_drafter(policy, range(0, VOCAB, 2)), folder / "silent", torch.float32)
    engine.update_drafter(folder / "silent")
    found.append([r.token_ids for r in engine.generate(asked)])
    assert {r.strategy for r in engine.records} == {"eagle3:3"}
    save_drafter(tiny_eagle3(policy), folder / "drafter", torch.float32)
    engine.update_drafter(folder / "drafter")
    always_draft(engine, 0, monkeypatch)
    rollouts = engine.generate(asked)
    found.append([r.token_ids for r in rollouts])
    assert mean_acceptance_length(rollouts) == 1.0
    with torch.no_grad():
        wanted = policy.generate(
            torch.tensor([asked[0].prompt_ids]), max_new_tokens=32, do_sample=False, eos_token_id=None
        )
    assert found[0][0] == wanted[0, 4:].tolist()
    assert found[0] == found[1] == found[2]


def drafts_after_plain_steps(engine, asked, monkeypatch):
    """Decodes plainly and with drafts in turn; returns what is drafted and the number of drafter forwards."""
    order, found, forwards = itertools.count(), [], []
    always_draft(engine, 3, monkeypatch)
    arms = [PLAIN] * 9 + [Strategy("eagle3", 3)] * 2
    monkeypatch.setattr(
        engine.control.selector, "choose", lambda active, context, explore: arms[next(order) % len(arms)]
    )
    scheduler = engine_core(engine).scheduler
    update = scheduler.update_draft_token_ids

    def spy(drafts):
        found.append([list(tokens) for tokens in drafts.draft_token_ids])
        update(drafts)

    monkeypatch.setattr(scheduler, "update_draft_token_ids", spy)
    model = engine_core(engine).model_executor.driver_worker.worker.model_runner.drafter.model
    hook = model.register_forward_hook(lambda *call: forwards.append(1))
    engine.generate(asked)
    hook.remove()
    return found, len(forwards)


def engine_core(engine):
    return engine._llm.llm_engine.engine_core.engine_core


def test_steps_without_drafts_spare_the_drafter_and_cost_it_nothing(served, monkeypatch):
    """What it drafts afterwards is what it drafts if it has read every token at once."""
    engine, _ = served
    asked = requests(5, 60, temperature=0.0)
    with monkeypatch.context() as patch:
        spared, few = drafts_after_plain_steps(engine, asked, patch)
    with monkeypatch.context() as patch:
        patch.setattr(SpecDecodeBaseProposer, "propose", SpecDecodeBaseProposer.propose.__wrapped__)
        usual, many = drafts_after_plain_steps(engine, asked, patch)
    assert any(any(tokens) for tokens in spared)
    assert spared == usual
    assert few < 0.6 * many


def test_a_zeroed_drafter_is_switched_off_and_a_good_one_is_used(policy, served, caplog, monkeypatch):
    """The policy repeats one token after this prompt, so that a constant draft is either right or wrong."""
    engine, folder = served
    # the bandit would leave a bad drafter alone before the watchdog has seen enough of it
    arm = Strategy("eagle3", 3)
    monkeypatch.setattr(engine.control.selector, "choose", lambda active, context, explore: arm)
    params = SamplingParams(max_tokens=60, temperature=0.0)
    asked = [Request([4, 5, 6, 7], params, seed=i) for i in range(8)]
    (token,) = {t for r in engine.generate(asked[:1]) for t in r.token_ids}
    assert 0 < token <= VOCAB // 2
    for name, vocabulary in (("zeroed", range(VOCAB // 2)), ("good", range(token, token + VOCAB // 2))):
        save_drafter(silent_drafter(policy, vocabulary), folder / name, torch.float32)
    engine.update_drafter(folder / "good")  # the one before may be switched off already
    engine.generate(asked)
    assert engine.control.status()["speculation_on"]
    caplog.clear()
    engine.update_drafter(folder / "zeroed")
    trips = engine.control.watchdog.trips["dead"]
    engine.generate(asked * 3)
    assert engine.control.watchdog.trips["dead"] == trips + 1
    assert not engine.control.status()["speculation_on"]
    assert engine.records[-1].strategy == "plain"
    engine.update_drafter(folder / "good")
    rollouts = engine.generate(asked)
    assert engine.control.status()["speculation_on"]
    assert engine.control.watchdog.acceptance_length > 1.9
    assert {t for r in rollouts for t in r.token_ids} == {token}
    assert caplog.text.count("speculation is off") == caplog.text.count("speculation is on again") == 1
    engine.update_drafter(folder / "drafter")


def test_the_law_of_two_tokens_is_exact_with_drafts(policy, served, monkeypatch):
    """χ² of the pair's distribution, drafts verified among them."""
    engine, _ = served
    always_draft(engine, 3, monkeypatch)
    asked = [Request([3, 5, 6, 7], SamplingParams(max_tokens=3), seed=1000 + i) for i in range(4000)]
    pairs = [tuple(r.token_ids[1:3]) for r in engine.generate(asked)]
    assert "eagle3:3" in {r.strategy for r in engine.records}
    with torch.no_grad():
        first = policy(torch.tensor([[3, 5, 6, 7]])).logits[0, -1].softmax(-1)
        firsts = torch.tensor([[3, 5, 6, 7, t] for t in range(VOCAB)])
        second = policy(firsts).logits[:, -1].softmax(-1)
        both = torch.tensor([[3, 5, 6, 7, a, b] for a in range(VOCAB) for b in range(VOCAB)])
        third = torch.cat([policy(part).logits[:, -1].softmax(-1) for part in both.split(512)]).view(
            VOCAB, VOCAB, VOCAB
        )
    law = torch.einsum("a,ab,abc->bc", first, second, third).flatten()
    counts = torch.zeros(VOCAB * VOCAB)
    for b, c in pairs:
        counts[b * VOCAB + c] += 1
    order = law.argsort(descending=True)
    large = order[law[order] * len(pairs) >= 5]
    observed = torch.cat([counts[large], counts.sum()[None] - counts[large].sum()])
    expected = torch.cat([law[large], 1 - law[large].sum()[None]]) * len(pairs)
    assert len(large) > 10
    assert chisquare(observed.numpy(), (expected * observed.sum() / expected.sum()).numpy()).pvalue > 1e-3


def test_new_weights_are_drawn_from(policy, served):
    engine, folder = served
    with torch.no_grad():
        kept = {name: p.clone() for name, p in policy.named_parameters()}
        for p in policy.parameters():
            p.add_(0.05 * torch.randn_like(p))
    try:
        weights = {name: p.detach().clone() for name, p in policy.named_parameters()}
        half = len(weights) // 2
        for number, names in enumerate((list(weights)[:half], list(weights)[half:])):
            save_file({name: weights[name] for name in names}, folder / f"part-{number}.safetensors")
        engine.update_policy([folder / "part-0.safetensors", folder / "part-1.safetensors"], version=5)
        rollouts = engine.generate(requests(4, 16))
        assert worst_gap(policy, rollouts) < 2e-3
        assert all(r.segments == [(5, 16)] for r in rollouts)
    finally:
        with torch.no_grad():
            for name, p in policy.named_parameters():
                p.copy_(kept[name])
        save_file(kept, folder / "back.safetensors")
        engine.update_policy([folder / "back.safetensors"], version=6)


def test_plain_requests_draft_nothing_and_spare_the_drafter(policy, served, monkeypatch):
    """Not even the drafter's layer runs; what comes after has its keys and values from itself."""
    from vllm.v1.spec_decode.eagle import EagleProposer

    engine, _ = served
    always_draft(engine, 3, monkeypatch)
    forwards = []
    monkeypatch.setattr(
        EagleProposer,
        "set_inputs_first_pass",
        lambda *args, kept=EagleProposer.set_inputs_first_pass, **options: (
            forwards.append(1) or kept(*args, **options)
        ),
    )
    asked = requests(6, 40, temperature=0.0)
    drafted = engine.generate(asked)
    assert forwards
    forwards.clear()
    learned = engine.control.status()["steps_by_depth"]
    plain = engine.generate_plain(asked)
    assert not forwards
    assert [r.token_ids for r in plain] == [r.token_ids for r in drafted]
    assert {r.strategy for r in engine.records} == {"plain"}
    assert engine.control.status()["steps_by_depth"] == learned
    again = engine.generate(asked)
    assert mean_acceptance_length(again) == mean_acceptance_length(drafted)
    assert forwards


def test_stops_and_refusals(served):
    engine, _ = served
    stopping = requests(4, 64, stop_token_ids=tuple(range(0, VOCAB, 3)))
    too_long = Request(list(range(1, 60)) * 6, SamplingParams(max_tokens=4), seed=1)
    *stopped, refused = engine.generate([*stopping, too_long])
    for rollout in stopped:
        assert rollout.finish_reason is FinishReason.STOP
        assert [t % 3 == 0 for t in rollout.token_ids] == [False] * (len(rollout.token_ids) - 1) + [True]
    assert refused.finish_reason is FinishReason.FAILED
    assert "\n" not in refused.error


def test_a_callback_that_fails_leaves_nothing_behind(served):
    engine, _ = served

    def fail(record):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        engine.generate(requests(4, 32), fail)
    assert len(engine.generate(requests(3, 8))) == 3
    assert engine.control.schedule()
