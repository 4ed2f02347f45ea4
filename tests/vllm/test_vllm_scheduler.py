"""The scheduler in vLLM's own data structures: steps are as wide as the depth that was chosen, whatever
vLLM's kind of scheduling.
"""

from collections import deque

import pytest

pytest.importorskip("vllm")

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from paceline.drafter_trainer.storage.checkpoint import save_drafter
from paceline.rollout.backends.adaptive.vllm_options import ADAPTIVE_SCHEDULER
from paceline.rollout.backends.vllm_plain import MARK
from paceline.rollout.backends.vllm_scheduler import AdaptiveAsyncScheduler, AdaptiveScheduler
from paceline.rollout.strategy import PLAIN, Strategy
from tests.engines import tiny_eagle3, tiny_llama

pytestmark = pytest.mark.vllm
BLOCK, PROMPT, LONGEST, MOST = 16, 8, 128, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    policy = tiny_llama(64, hidden=256)
    policy.save_pretrained(path / "policy")
    save_drafter(tiny_eagle3(policy), path / "drafter", torch.float32)
    return path


def config_for(folder, asynchronous, **speculative):
    drafts = {"method": "eagle3", "model": str(folder / "drafter"), "num_speculative_tokens": MOST}
    arguments = EngineArgs(
        model=str(folder / "policy"),
        max_model_len=LONGEST,
        max_num_seqs=8,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        speculative_config=drafts | speculative,
        scheduler_cls=ADAPTIVE_SCHEDULER,
    )
    config = arguments.create_engine_config()
    config.scheduler_config.async_scheduling = asynchronous  # vLLM's CPU platform turns it off
    config.cache_config.num_gpu_blocks = 1000
    return config


def scheduler_for(config):
    """As vLLM's engine core builds it; the kinds of layers are made up."""
    layer = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(1000, [], [KVCacheGroupSpec(["layer"], layer)]),
        structured_output_manager=StructuredOutputManager(config),
        include_finished_set=False,
        log_stats=False,
        block_size=BLOCK,
        hash_block_size=BLOCK,
    )


def script(scheduler, depths):
    """Lets the bandit choose these depths in turn; returns the list of what it is told."""
    selector, order, told = scheduler.control.selector, iter(depths), []

    def choose(active, context, explore):
        depth = next(order)
        return Strategy("eagle3", depth) if depth else PLAIN

    selector.choose, selector.record = choose, told.append
    return told


def add(scheduler, names, tokens=64, plain=False):
    for name in names:
        marks = {MARK: 1} if plain else None
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, extra_args=marks)
        params.update_from_generation_config({}, eos_token_id=None)
        scheduler.add_request(Request(name, list(range(1, PROMPT + 1)), params, None))


def run(scheduler, steps, in_flight, accept=1):
    """Schedules and finishes steps as the engine core does; ``accept`` drafts of each request are right.

    Returns the widths of the drafts of each step, by request.
    """
    widths, queue = [], deque()
    for _ in range(steps):
        output = scheduler.schedule()
        drafts = {n: len(output.scheduled_spec_decode_tokens.get(n, ())) for n in output.num_scheduled_tokens}
        widths.append(drafts)
        queue.append((output, drafts))
        if len(queue) == in_flight:
            finish(scheduler, *queue.popleft(), asynchronous=in_flight > 1, accept=accept)
    return widths


def finish(scheduler, output, drafts, asynchronous, accept):
    names = list(drafts)
    sampled = [[7] * (1 + min(accept, drafts[name])) for name in names]
    rows = {name: row for row, name in enumerate(names)}
    scheduler.update_from_output(output, ModelRunnerOutput(names, rows, sampled))
    if not asynchronous:  # the worker always hands over its maximum, as vLLM's does near the longest context
        scheduler.update_draft_token_ids(DraftTokenIds(names, [[5] * MOST for _ in names]))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_steps_are_as_wide_as_the_depth_that_the_step_before_chose(folder, asynchronous):
    scheduler = scheduler_for(config_for(folder, asynchronous))
    assert type(scheduler) is (AdaptiveAsyncScheduler if asynchronous else AdaptiveScheduler)
    assert scheduler.control.depths == [0, 1, 2, 3]
    chosen = [0, 0, 2, 3, 3, 0, 0, 1, 1, 1, 0, 3]
    told = script(scheduler, chosen)
    add(scheduler, ["a", "b", "c"])
    widths = run(scheduler, len(chosen), in_flight=2 if asynchronous else 1)
    assert not scheduler.control.broken
    assert widths[0] == dict.fromkeys("abc", 0)
    for depth, width in zip(chosen, widths[1:], strict=False):
        assert width == dict.fromkeys("abc", depth)
    # the choices of two steps agree at the second 0, 3, 0, 1 and 1; the first time of each depth is dropped,
    # and the first 0 belongs to a prompt's step
    assert [f.strategy.depth for f in told] == [0, 1]
    assert told[1].accepted == [1, 1, 1] and told[1].committed == 6


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_request_near_the_longest_context_stops_all_drafts_and_new_ones_join(folder, asynchronous):
    """vLLM's proposers then return zeros for every request, as wide as the maximum."""
    scheduler = scheduler_for(config_for(folder, asynchronous))
    script(scheduler, [3] * 200)
    add(scheduler, ["a"], tokens=LONGEST)
    shapes, scheduled = [], scheduler.control.scheduled

    def watched(key, shape, now):
        shapes.append(shape)
        return scheduled(key, shape, now)

    scheduler.control.scheduled = watched
    widths = run(scheduler, 80, in_flight=2 if asynchronous else 1)
    assert not scheduler.control.broken
    assert {"a": 3} in widths
    assert widths[-1] == {}  # it is finished
    assert (shapes[0].prompt_tokens, list(shapes[0].drafted)) == (PROMPT, [])
    assert (shapes[1].prompt_tokens, list(shapes[1].drafted)) == (0, [3])
    assert not all(shape.fits for shape in shapes)
    for shape, after in zip(shapes, widths[1:], strict=False):
        assert shape.fits or after.get("a", 0) == 0
    add(scheduler, ["b"])
    assert run(scheduler, 4, in_flight=1)[1:] == [{"b": 3}] * 3


def test_where_depths_cannot_be_chosen_the_depth_stays(folder):
    """Also where the schedule that names depths was put in because the method was not known yet."""
    config = config_for(folder, True)
    config.speculative_config.method = "medusa"
    scheduler = scheduler_for(config)
    assert scheduler.control is None
    add(scheduler, ["a", "b"])
    assert run(scheduler, 4, in_flight=2)[1:] == [{"a": 3, "b": 3}] * 3


def test_ranks_that_schedule_each_for_itself_all_draft_the_most(folder):
    """TRL's colocate mode with tensor parallelism: depths from each rank's own times would part the ranks."""
    config = config_for(folder, False)
    config.parallel_config.distributed_executor_backend = "external_launcher"
    assert scheduler_for(config).control is not None  # a rank for itself
    config.parallel_config.world_size = 2
    scheduler = scheduler_for(config)
    assert scheduler.control is None
    add(scheduler, ["a"])
    assert run(scheduler, 4, in_flight=1)[1:] == [{"a": MOST}] * 3


def test_a_users_schedule_names_the_depths_and_counts_when_the_control_breaks(folder):
    config = config_for(folder, False, num_speculative_tokens_per_batch_size=[[1, 1, 2], [2, 8, 1]])
    scheduler = scheduler_for(config)
    assert scheduler.control.depths == [0, 1, 2]
    scheduler.control.selector = None
    add(scheduler, ["a", "b"])
    assert run(scheduler, 4, in_flight=1)[1:] == [{"a": 1, "b": 1}] * 3
    assert scheduler.control.broken


def test_pauses_and_weight_updates_are_told_to_the_control(folder):
    scheduler = scheduler_for(config_for(folder, False))
    told = []
    scheduler.control.policy_changed = lambda: told.append(1)
    scheduler.set_pause_state(PauseState.UNPAUSED)
    scheduler.reset_prefix_cache()
    assert len(told) == 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_nothing_is_drafted_beside_a_plain_request(folder, asynchronous):
    scheduler = scheduler_for(config_for(folder, asynchronous))
    told = script(scheduler, [3] * 20)
    in_flight = 2 if asynchronous else 1
    add(scheduler, ["a", "b"])
    assert run(scheduler, 4, in_flight)[-1] == {"a": 3, "b": 3}
    add(scheduler, ["c"], plain=True)
    before = len(told)
    widths = run(scheduler, 6, in_flight)
    assert widths[-1] == dict.fromkeys("abc", 0)
    assert len(told) <= before + 1  # a step that was under way
    assert not scheduler.control.broken
