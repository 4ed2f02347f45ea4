"""Rollouts for a host: a trainer that is not ours, which owns the policy and hands over prompts."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from paceline.drafter_trainer.spot_trainer import LearnerReport
from paceline.drafter_trainer.storage.checkpoint import save_drafter
from paceline.drafter_trainer.storage.export import hub_id
from paceline.drafter_trainer.storage.model_card import DrafterFacts, drafter_card, license_of
from paceline.rl.checkpointing.checkpoint import Checkpoint
from paceline.rl.checkpointing.parts import restore_selector, write_speculation
from paceline.rl.config.parsing import parse
from paceline.rl.config.run import RunConfig
from paceline.rl.drafting.rank_drafter import RankDrafter
from paceline.rl.drafting.shared import SharedDrafter
from paceline.rl.errors import UserError
from paceline.rl.generation.worker import RolloutWorker
from paceline.rl.integrations.policy import HostPolicy
from paceline.rl.process.files import read_object, write_whole
from paceline.rl.types import RankRollouts
from paceline.rl.validation.speculation import check_drafting
from paceline.rollout import FinishReason, Request, StepRecord, mean_acceptance_length

_SECTIONS = {"speculation", "drafter", "rollout", "measure"}
_ROLLOUT = {"max_context", "max_slots", "dtype", "kv_memory_gb", "stop_strings"}


def host_config(options: Mapping[str, Any], from_host: Mapping[str, Any], alone: bool) -> RunConfig:
    """A recipe from what a user chose and what the host decides.

    Args:
        options: Sections ``speculation``, ``drafter``, ``measure`` and ``rollout`` as in a recipe, as far as
            ours to decide.
        from_host: The rest, as in a recipe.
        alone: One rank, which never idles: without a schedule or a drafter of the user's, none is trained and
            suffixes draft.

    Raises:
        UserError: for what is unknown, contradictory, or the host's to decide.
    """
    for name in options:
        if name not in _SECTIONS:
            raise UserError(
                f"paceline: {name} is not a section of its own here; there are: "
                f"{', '.join(sorted(_SECTIONS))}"
            )
    for name in options.get("rollout", {}):
        if name not in _ROLLOUT:
            raise UserError(
                f"paceline: rollout.{name} is the trainer's to decide; ours are: "
                f"{', '.join(sorted(_ROLLOUT))}"
            )
    data = {name: dict(section) for name, section in options.items()}
    for name, section in from_host.items():
        data[name] = {**section, **data.get(name, {})} if isinstance(section, Mapping) else section
    drafter, speculation = data.setdefault("drafter", {}), data.setdefault("speculation", {})
    if alone and "schedule" not in drafter and "start" not in drafter:
        speculation.setdefault("drafters", ["suffix"])
    config = parse(RunConfig, data, where="paceline")
    if config.drafter.reward_weight:
        raise UserError(
            "paceline: drafter.reward_weight needs rewards, which the trainer computes after the rollouts: "
            "leave it out"
        )
    check_drafting(config)
    return config


class HostedRollouts:
    """One rank's engine, its drafters and their training, on a policy that a host owns. Every rank of the
    host has one, and calls `refresh` before rollouts.

    Args:
        config: From `host_config`; ``out`` is where drafters and traces go.
        policy: The host's.
        tokenizer: Its tokenizer.
        accelerator: Of the host's process group.
        say: Where one line about a problem goes.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: HostPolicy,
        tokenizer: Any,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.policy, self._accelerator, self._say = config, policy, accelerator, say
        self._decoded_with: Any = None
        self.worker = RolloutWorker(config, policy.decoded, tokenizer)
        self.engine = self.worker.engine
        local = RankDrafter(config, policy.decoded, self.worker, accelerator.process_index)
        self.drafter = SharedDrafter(config, local, accelerator, Path(config.out), say)
        self.drafter.start()
        self._calls = 0
        self._acceptance_length: float | None = None

    def refresh(self) -> bool:
        """Decodes with the host's present weights from now on: reads them all, and renews the engine's copies
        where anything has changed since the last call. Collective where they lie in parts. Returns whether it
        renewed them.
        """
        now = self.policy.fingerprint()
        changed = now is None or now != self._decoded_with
        if self.policy.in_parts:
            changed = any_rank(self._accelerator, changed)
        if changed:
            self._decoded_with = None  # until all of it has succeeded
            self.policy.refresh()
            self.engine.refresh_weights()
            self._decoded_with = now
        return changed

    def rollouts(self, requests: Sequence[Request]) -> RankRollouts:
        """This rank's completions, in the order of ``requests``.

        Raises:
            UserError: where one failed; the first reason is given.
        """
        begin = time.perf_counter()

        def on_step(record: StepRecord) -> None:
            self.drafter.coordinator.beat()

        made = self.engine.generate(requests, on_step)
        failed = next((r for r in made if r.finish_reason is FinishReason.FAILED), None)
        if failed is not None:
            raise UserError(f"paceline: a rollout failed: {failed.error}")
        return RankRollouts(
            [],
            made,
            time.perf_counter() - begin,
            list(self.engine.records),
            drawn=sum(len(r.token_ids) for r in made),
        )

    def step(self, requests: Sequence[Request]) -> tuple[RankRollouts, LearnerReport]:
        """Makes the rollouts of a training step. A rank that has finished trains the drafter while others
        decode, and then all ranks share what was trained. Collective.
        """
        self.drafter.coordinator.begin(self._calls)
        batch = self.rollouts(requests)
        report = self.drafter.train(batch, [0.0] * len(batch.rollouts), self._calls)
        self._accelerator.wait_for_everyone()
        if self.config.measure.plain_every and (self._calls + 1) % self.config.measure.plain_every == 0:
            self.worker.measure_plain(batch)
            self._accelerator.wait_for_everyone()
        self.drafter.share(batch, report, self._calls)
        self._calls += 1
        if any(record.strategy.startswith("eagle3") for record in batch.records):
            self._acceptance_length = mean_acceptance_length(batch.rollouts)
        return batch, report

    def save(self, folder: Path) -> None:
        """Writes the drafter, its optimizer and what the selector has learned; on the main rank.

        Raises:
            UserError: when it cannot be written; the host's own checkpoint is not touched.
        """
        spot = self.drafter.local.spot
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_speculation(
                folder,
                spot.serving if spot else None,
                spot.learner.optimizer if spot else None,
                self.engine.speculation.selector.state(),
            )
            write_whole(folder / "state.json", json.dumps({"calls": self._calls}))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}: the drafter could not be written ({error}); free some disk") from None

    def load(self, folder: Path) -> None:
        """Goes on from what `save` wrote. Collective.

        Raises:
            UserError: for files that are broken; a drafter that cannot be read is made anew, with one line.
        """
        try:
            self._calls = int(read_object(folder / "state.json")["calls"])
        except UserError as error:
            raise UserError(f"{error}; remove {folder} to begin with a new drafter") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder / 'state.json'}: no count of calls ({error}); remove {folder} to begin anew"
            ) from None
        found = Checkpoint(folder, self._calls)
        self.drafter.resume(found)
        if (problem := restore_selector(found, self.engine.speculation.selector)) is not None:
            warnings.warn(problem, stacklevel=2)

    def take_over(self, earlier: HostedRollouts) -> None:
        """Goes on with the drafter of another one of the same run. Collective."""
        earlier.drafter.finish()
        folder = Path(self.config.out) / "handover"
        if self._accelerator.is_main_process:
            earlier.save(folder)
        self._accelerator.wait_for_everyone()
        self.load(folder)
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self) -> Path | None:
        """Exports the drafter into ``out``, once nothing is being written any more. Returns its directory, on
        the main rank.
        """
        self.drafter.finish()
        if self.drafter.local.spot is None or not self._accelerator.is_main_process:
            return None
        path, drafter = Path(self.config.out) / "drafter", self.drafter.local.spot.serving
        name = str(self.drafter.local.policy_config.name_or_path)
        facts = DrafterFacts(
            target=name,
            base_model=hub_id(name, path),
            license=license_of(Path(name)),
            temperature=self.config.rollout.temperature,
            acceptance_length=self._acceptance_length,
        )
        try:
            save_drafter(drafter, path)
            (path / "README.md").write_text(
                drafter_card(facts, drafter.config.draft_vocab_size, path.name), encoding="utf-8"
            )
        except (OSError, SafetensorError) as error:  # the training that is over stays
            self._say(f"{path}: the drafter could not be written ({error}); the last checkpoint has it")
            return None
        return path


def any_rank(accelerator: Accelerator, value: bool) -> bool:
    """Whether it is so on some rank. Collective."""
    count = torch.tensor([int(value)], device=accelerator.device)
    return bool(accelerator.reduce(count, "sum").item())


def step_report(batch: RankRollouts, report: LearnerReport) -> dict[str, float]:
    """A rank's numbers of a step, by the names that hosts log."""
    tokens = sum(len(r.token_ids) for r in batch.rollouts)
    found = {
        "paceline/rollout_seconds": batch.seconds,
        "paceline/tokens_per_second": tokens / batch.seconds,
        "paceline/acceptance_length": mean_acceptance_length(batch.rollouts),
        "paceline/speculated_share": sum(r.strategy != "plain" for r in batch.records)
        / max(len(batch.records), 1),
        "paceline/drafter_seconds": report.seconds,
        "paceline/drafter_updates": float(report.updates),
    }
    if batch.plain_seconds is not None:
        found["paceline/speedup_over_plain"] = batch.plain_seconds / batch.seconds
    return found
