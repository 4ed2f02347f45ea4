"""Group drafts in vLLM: they change no greedy token and no distribution, what siblings and earlier epochs
said is accepted more often than a completion's own n-grams, and the scheduler says how much is drafted.
"""

import json

import pytest
import torch
from scipy.stats import chisquare

pytest.importorskip("vllm")

from vllm import LLM, SamplingParams

from paceline.rollout.backends.adaptive.draft_watchdog import Mode
from paceline.rollout.backends.adaptive.vllm_options import STATUS_VARIABLE, VARIABLE
from paceline.rollout.backends.vllm_scheduler import AdaptiveScheduler
from paceline.rollout.backends.vllm_suffix import GroupSuffixProposer
from paceline.rollout.strategy import PLAIN, Strategy
from tests.engines import tiny_llama

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
VOCAB, MOST = 64, 4
NGRAM = {"method": "ngram", "num_speculative_tokens": MOST, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
PROMPTS = [[1 + i, 5, 6, 7] for i in range(4)]


@pytest.fixture(scope="module")
def policy():
    return tiny_llama(VOCAB, layers=8, sharpness=12.0, hidden=256)


@pytest.fixture(scope="module")
def folder(policy, tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    policy.save_pretrained(path)
    return path


def start(folder, patch, **options):
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    return LLM(
        str(folder),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=16,
        enforce_eager=True,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        generation_config="vllm",
        **options,
    )


@pytest.fixture(scope="module")
def group(folder):
    """An engine whose drafts and scheduler come from the environment; the class's path names the method."""
    model = "paceline.rollout.backends.vllm_suffix.GroupSuffixProposer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STATUS_VARIABLE, "")  # it is set while the engine starts
        patch.setenv(VARIABLE, json.dumps({"speculative": {"model": model, "num_speculative_tokens": MOST}}))
        llm = start(folder, patch)
    assert isinstance(scheduler_of(llm), AdaptiveScheduler)
    return llm


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def drafter_of(llm):
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner.drafter


def script(llm, monkeypatch, depths):
    """Lets the bandit choose these depths in turn; returns the list of chosen ones."""
    control, order, chosen = scheduler_of(llm).control, iter(depths), []

    def choose(active, context, explore):
        chosen.append(next(order))
        return Strategy("custom_class", chosen[-1]) if chosen[-1] else PLAIN

    monkeypatch.setattr(control.selector, "choose", choose)
    monkeypatch.setattr(control.watchdog, "mode", lambda now: Mode.ON)
    return chosen


def forever(depth):
    while True:
        yield depth


def complete(llm, prompts, samples, seed=0, tokens=48, temperature=1.0):
    """Completions of every sample of every prompt."""
    jobs = [(prompt, seed + i) for prompt in prompts for i in range(samples)]
    params = [
        SamplingParams(temperature=temperature, max_tokens=tokens, seed=i, ignore_eos=True, detokenize=False)
        for _, i in jobs
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in jobs], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def accepted(llm):
    """vLLM's count of accepted draft tokens."""
    name = "vllm:spec_decode_num_accepted_tokens"
    return next(metric.value for metric in llm.get_metrics() if metric.name == name)


def share_accepted(llm, epoch):
    """The share of tokens that were drafted, with other seeds in each epoch."""
    before = accepted(llm)
    found = complete(llm, [[1 + i, 9, 8] for i in range(4)], 4, seed=100 * epoch)
    return (accepted(llm) - before) / sum(map(len, found))


def test_drafts_change_no_greedy_token(policy, group, monkeypatch):
    script(group, monkeypatch, forever(MOST))
    wanted = [
        policy.generate(torch.tensor([p]), max_new_tokens=48, do_sample=False, eos_token_id=None)[0, len(p) :]
        for p in PROMPTS
    ]
    before = accepted(group)
    for _ in range(2):
        found = complete(group, PROMPTS, 2, temperature=0.0)
        assert found == [tokens.tolist() for tokens in wanted for _ in range(2)]
    assert accepted(group) - before > 4 * 2 * 48 / 2  # the second time, each text is known


def test_the_law_of_two_tokens_is_exact_with_drafts(policy, group, monkeypatch):
    """χ² of the pair's distribution; the first token is drafted for, the second one is verified."""
    script(group, monkeypatch, forever(MOST))
    prompt, count = [3, 5, 6, 7], 4000
    before = accepted(group)
    pairs = [tuple(tokens[:2]) for tokens in complete(group, [prompt], count, seed=1000, tokens=3)]
    assert accepted(group) - before > count / 10
    with torch.no_grad():
        first = policy(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        second = policy(torch.tensor([[*prompt, t] for t in range(VOCAB)])).logits[:, -1].softmax(-1)
    law = (first[:, None] * second).flatten()
    counts = torch.zeros(VOCAB * VOCAB)
    for a, b in pairs:
        counts[a * VOCAB + b] += 1
    large = (law * count >= 5).nonzero()[:, 0]
    assert len(large) > 10
    observed = torch.cat([counts[large], counts.sum()[None] - counts[large].sum()])
    expected = torch.cat([law[large], 1 - law[large].sum()[None]]) * count
    assert chisquare(observed.numpy(), (expected * observed.sum() / expected.sum()).numpy()).pvalue > 1e-3


def test_the_scheduler_says_how_much_is_drafted(group, monkeypatch):
    """Nothing is drafted to be cut away afterwards."""
    drafter, widths = drafter_of(group), []
    assert isinstance(drafter, GroupSuffixProposer)
    propose = drafter.propose

    def watched(*args, **kwargs):
        drafts = propose(*args, **kwargs)
        widths.append(max(map(len, drafts)))
        return drafts

    monkeypatch.setattr(drafter, "propose", watched)
    complete(group, PROMPTS[:1], 1, seed=5, temperature=0.0)
    widths.clear()
    chosen = script(group, monkeypatch, [0, 3, 0, 1, 2, 4, 4, 0, 1, 1] * 20)
    complete(group, PROMPTS[:1], 1, seed=5, temperature=0.0)
    assert len(widths) > 10
    assert widths[:10] == chosen[:10]


def test_more_is_accepted_than_of_a_completions_own_ngrams(folder, group, monkeypatch):
    """Two epochs of four prompts with four samples each. The other engine comes last: vLLM 0.32 starts none
    after one with n-grams in the same process.
    """
    script(group, monkeypatch, forever(MOST))
    found = [share_accepted(group, epoch) for epoch in range(2)]
    ngram = start(folder, monkeypatch, speculative_config=NGRAM)  # its metrics take the place of the first's
    wanted = [share_accepted(ngram, epoch) for epoch in range(2)]
    assert found[0] > wanted[0]
    assert found[1] > 1.2 * wanted[1]
    assert found[1] > found[0]
