"""Whole or in parts: two ranks train the same, whichever way, and go on from each other's state."""

import copy
import math
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from paceline.rl.config.scale import LoraConfig, ScaleConfig
from paceline.rl.errors import UserError
from paceline.rl.learner.balance import assign_ranks, redistribute
from paceline.rl.learner.log_probs import PolicyLogProbs
from paceline.rl.learner.microbatches import packed_step
from paceline.rl.learner.packing import PackedBatch, PromptRow, Sample, pack
from paceline.rl.models.lora import (
    add_adapters,
    load_adapters,
    merged_weights,
    save_adapters,
    without_adapters,
)
from paceline.rl.models.mergeable import adapted_layers
from paceline.rl.sharding import AdamWSettings, FullState, TrainedModule, gather_full_state, shard
from paceline.rl.sharding.settings import read_settings
from paceline.rl.types import TrainingSample
from tests.engines import tiny_llama
from tests.support import ROOT

SETTINGS = AdamWSettings(lr=1e-3, weight_decay=0.01, grad_clip=0.5, precision="no")
MODES = {
    "replicated": ScaleConfig(),
    **{
        f"zero{stage}": ScaleConfig(deepspeed=str(ROOT / f"configs/deepspeed/zero{stage}.json"))
        for stage in range(3)
    },
    "zero3": ScaleConfig(deepspeed=str(ROOT / "tests/rl/sharding/zero3_in_parts.json")),
    "fsdp2": ScaleConfig(fsdp2=True),
}
ROWS = [PromptRow([1 + i, 2, 3], (Sample(i, [5 + i, 7, 9, i]), Sample(i + 4, [8, i + 1]))) for i in range(4)]
BEFORE, AFTER = 3, 2
LENGTHS = ([900, 30, 20, 400], [10, 50])


def steps(
    accelerator: Accelerator, trained: TrainedModule, rows: list[PromptRow], count: int, scale: float
) -> list[float]:
    """Optimizer steps on log-probs with signs, a micro-batch a row: the gradients' norms."""

    def loss(batch: PackedBatch) -> torch.Tensor:
        signs = torch.tensor([1.0 if i % 2 else -1.0 for i in batch.members])
        return -(trained.module(batch, 0.7)[0] * signs[batch.owner]).sum() * scale

    batches = [pack([row]) for row in rows]
    return [
        packed_step(accelerator, trained, batches, loss, lambda b: trained.module(b, 0.7)[0].sum())
        for _ in range(count)
    ]


def alone() -> tuple[list[float], dict[str, torch.Tensor]]:
    """One process, one micro-batch of everything, plain torch: norms and the weights at the end."""
    module = PolicyLogProbs(tiny_llama())
    optimizer = SETTINGS.over(module)
    batch = pack(ROWS)
    signs = torch.tensor([1.0 if i % 2 else -1.0 for i in batch.members])[batch.owner]
    norms = []
    for _ in range(BEFORE + AFTER):
        optimizer.zero_grad()
        (-(module(batch, 0.7)[0] * signs).sum() / 8).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), SETTINGS.grad_clip)))
        optimizer.step()
    return norms, {name: p.detach().clone() for name, p in module.named_parameters()}


def wrapped(mode: str, accelerator: Accelerator, state: FullState | None) -> TrainedModule:
    module = PolicyLogProbs(tiny_llama())
    if state is not None:
        module.load_state_dict(state.weights, strict=False)
    trained = shard(module, MODES[mode], accelerator, SETTINGS)
    if state is not None:
        trained.load_optimizer_state(copy.deepcopy(state.optimizer))
    return trained


def state_for_all(trained: TrainedModule) -> FullState:
    whole = gather_full_state(
        trained.full_weights(lambda name: True), trained, main=torch.distributed.get_rank() == 0
    )
    box = [whole]
    torch.distributed.broadcast_object_list(box)
    return copy.deepcopy(box[0])  # some give out what they go on working with


def two_ranks(rank: int, port: int, folder: Path) -> None:
    """Rank 0 has three rows in three micro-batches, rank 1 one. Each mode starts anew, and goes on from what
    the one before it had saved."""
    torch.set_num_threads(1)
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in launched.items()} | {"MASTER_ADDR": "127.0.0.1"}
    accelerator = Accelerator(cpu=True)
    rows = ROWS[:3] if rank == 0 else ROWS[3:]
    found, saved = {}, None
    for mode in MODES:
        fresh = wrapped(mode, accelerator, None)
        norms = steps(accelerator, fresh, rows, BEFORE, 2 / 8)
        before, saved = saved, state_for_all(fresh)
        going_on = wrapped(mode, accelerator, before or saved)
        again = state_for_all(going_on)
        norms += steps(accelerator, going_on, rows, AFTER, 2 / 8)
        end = state_for_all(going_on)
        bad = steps(accelerator, going_on, rows, 1, math.inf if rank else 1.0)
        unmoved = state_for_all(going_on)
        found[mode] = {
            "norms": norms,
            "weights": end.weights,
            "moments": [
                (a["exp_avg"], b["exp_avg"], float(a["step"]))
                for a, b in zip(
                    again.optimizer["state"].values(),
                    (before or saved).optimizer["state"].values(),
                    strict=True,
                )
            ],
            "bad": bad[0],
            "unmoved": all(
                torch.equal(end.weights[name], tensor) for name, tensor in unmoved.weights.items()
            ),
        }
    samples = [
        TrainingSample(torch.tensor([rank, i]), torch.arange(n), torch.full((n,), float(rank)), torch.ones(n))
        for i, n in enumerate(LENGTHS[rank])
    ]
    share = redistribute(samples, [float(n) for n in LENGTHS[rank]], accelerator)
    box: list = [None, None]
    torch.distributed.all_gather_object(
        box, [(s.prompt.tolist(), len(s.completion), s.logprobs.tolist()) for s in share]
    )
    if rank == 0:
        torch.save({"modes": found, "spread": box}, folder / "found.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # threads that DeepSpeed and FSDP leave behind can abort a process that is taken down in order
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(two_ranks, args=(port, folder), nprocs=2)
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.ci
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_train_as_one_process_does(found, mode):
    """Other numbers of micro-batches on each rank, clipped gradients, and half of the way from another mode's
    state.
    """
    norms, weights = alone()
    of_mode = found["modes"][mode]
    assert of_mode["norms"] == pytest.approx(norms, rel=1e-4)
    assert norms[0] > SETTINGS.grad_clip
    for name, tensor in weights.items():
        torch.testing.assert_close(of_mode["weights"][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.ci
@pytest.mark.parametrize("mode", MODES)
def test_a_state_is_whole_wherever_its_parts_lay(found, mode):
    for taken_over, saved, step in found["modes"][mode]["moments"]:
        torch.testing.assert_close(taken_over, saved, rtol=1e-5, atol=1e-8)
        assert step == BEFORE


@pytest.mark.ci
@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_is_not_finite_is_left_out(found, mode):
    """One rank's loss is infinite: no rank moves."""
    assert not math.isfinite(found["modes"][mode]["bad"])
    assert found["modes"][mode]["unmoved"]


@pytest.mark.ci
def test_samples_go_where_there_is_less_to_do(found):
    own = [(LENGTHS[r][i], [r, i]) for r in range(2) for i in range(len(LENGTHS[r]))]
    totals = [sum(length for _, length, _ in share) for share in found["spread"]]
    assert max(totals) - min(totals) <= max(length for length, _ in own)
    assert sorted((length, prompt) for share in found["spread"] for prompt, length, _ in share) == sorted(own)
    assert all(
        logprobs == [float(prompt[0])] * length
        for share in found["spread"]
        for prompt, length, logprobs in share
    )


@given(st.lists(st.lists(st.integers(0, 500), max_size=12), min_size=1, max_size=6))
def test_parts_are_equal_but_for_a_sample(costs):
    ranks, total = len(costs), sum(map(sum, costs))
    shares = [0.0] * ranks
    for rank, (own, where) in enumerate(zip(costs, assign_ranks(costs), strict=True)):
        for cost, home in zip(own, where, strict=True):
            assert cost or home == rank, "what costs nothing stays"
            shares[home] += cost
    largest = max((c for own in costs for c in own), default=0)
    assert all(abs(share - total / ranks) <= largest for share in shares)


def test_a_recipe_decides_what_it_decides(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}')
    with pytest.raises(UserError, match=r"leave out 'gradient_clipping'; update.grad_clip of the recipe"):
        read_settings(str(path))
    path.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_settings(str(path))
    with pytest.raises(UserError, match="No such file"):
        read_settings(str(tmp_path / "none.json"))


@pytest.mark.parametrize("mode", ["zero3", "fsdp2"])
def test_sharding_needs_a_process_group(mode):
    with pytest.raises(UserError, match="torchrun"):
        shard(PolicyLogProbs(tiny_llama()), MODES[mode], Accelerator(cpu=True), SETTINGS)


class TestAdapters:
    LORA = LoraConfig(rank=4, alpha=8)

    def trained(self) -> tuple[torch.nn.Module, TrainedModule]:
        policy = tiny_llama()
        add_adapters(policy, self.LORA, seed=3)
        trained = shard(PolicyLogProbs(policy), ScaleConfig(), Accelerator(cpu=True), SETTINGS)
        steps(Accelerator(cpu=True), trained, ROWS, 5, 1 / 8)
        policy.set_attn_implementation("eager")
        return policy, trained

    def test_merged_weights_are_pefts(self, tmp_path):
        """Saved in peft's format and merged by peft: the weights that the engine gets."""
        policy, trained = self.trained()
        layers = adapted_layers(trained.unwrapped)
        ours = {
            name.removeprefix("policy."): t.clone()
            for name, t in merged_weights(trained.full_weights, layers)
        }
        found = trained.full_weights(lambda name: ".lora_" in name)
        save_adapters(policy, {name.removeprefix("policy."): t for name, t in found}, tmp_path)
        theirs = dict(PeftModel.from_pretrained(tiny_llama(), tmp_path).merge_and_unload().named_parameters())
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6, msg=name)
        start = dict(tiny_llama().named_parameters())
        assert any(not torch.allclose(start[name], tensor, atol=1e-4) for name, tensor in ours.items())

    def test_nothing_else_moves_and_the_start_is_still_there(self):
        policy, _ = self.trained()
        start, ids = tiny_llama(), torch.tensor([[1, 2, 3, 4]])
        moved = policy(ids).logits
        with without_adapters(policy):
            torch.testing.assert_close(policy(ids).logits, start(ids).logits)
        assert torch.equal(policy(ids).logits, moved) and not torch.allclose(
            moved, start(ids).logits, atol=1e-3
        )

    def test_a_run_goes_on_with_its_adapters(self, tmp_path):
        policy, trained = self.trained()
        found = trained.full_weights(lambda name: ".lora_" in name)
        save_adapters(policy, {name.removeprefix("policy."): t for name, t in found}, tmp_path)
        again = tiny_llama()
        again.set_attn_implementation("eager")
        add_adapters(again, self.LORA, seed=4)
        load_adapters(again, tmp_path)
        ids = torch.tensor([[1, 2, 3, 4]])
        assert torch.equal(again(ids).logits, policy(ids).logits)
        other = tiny_llama()
        add_adapters(other, LoraConfig(rank=2), seed=4)
        with pytest.raises(UserError, match="of another rank"):
            load_adapters(other, tmp_path)

    def test_names_that_are_not_there_are_one_line(self):
        with pytest.raises(UserError, match=r"scale.lora.targets: .*nothing_like_it"):
            add_adapters(tiny_llama(), LoraConfig(targets=("nothing_like_it",)), seed=0)
