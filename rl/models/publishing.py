"""A run's policy, adapters and drafter on the Hugging Face hub."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import huggingface_hub
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from paceline.drafter_trainer.storage.export import drafter_facts, export_drafter, hub_id
from paceline.rl.errors import UserError, one_line

_REFUSALS = {
    401: "the hub does not take the token: log in again with hf auth login, or set HF_TOKEN",
    403: "the token may not write there: use one with write access, or another name",
}


@dataclass(frozen=True, slots=True)
class Part:
    """What goes to one repository.

    Attributes:
        option: The option that named the repository.
        repository: As ``owner/name``.
        folder: Its files; a ``README.md`` of theirs is left out.
        card: Text of the ``README.md``.
    """

    option: str
    repository: str
    folder: Path
    card: str


def push_run(
    run: Path,
    *,
    policy: str | None,
    adapter: str | None,
    drafter: str | None,
    private: bool,
    say: Callable[[str], None],
) -> None:
    """Uploads parts of a run, each to a repository of its own, which is made where it is not there.
    Everything is read and checked before the first is sent.

    Args:
        run: A run's directory, with a checkpoint.
        policy, adapter, drafter: Repositories as ``owner/name``; None leaves the part out.
        private: Make new repositories private, and refuse public ones that are there.
        say: Where each address goes once its part is there.

    Raises:
        UserError: for names that are none, parts that the run does not have, no token, no right to write, or
            no hub.
        DrafterError: for a drafter that is not whole.
    """
    named = {"--policy": policy, "--adapter": adapter, "--drafter": drafter}
    wanted = {option: repository for option, repository in named.items() if repository is not None}
    if not wanted:
        raise UserError("nothing to push: name repositories with --policy, --adapter or --drafter owner/name")
    if len(set(wanted.values())) < len(wanted):
        raise UserError("two parts cannot share a repository: name one for each")
    for option, repository in wanted.items():
        _check_name(option, repository)
    with tempfile.TemporaryDirectory() as scratch:
        parts = []
        if policy is not None:
            parts.append(Part("--policy", policy, _folder(run, "policy"), _policy_card(run)))
        if adapter is not None:
            parts.append(Part("--adapter", adapter, _folder(run, "adapter"), _adapter_card(run, say)))
        if drafter is not None:
            folder = export_drafter(run, Path(scratch) / "drafter", target=policy, name=drafter)
            parts.append(
                Part("--drafter", drafter, folder, (folder / "README.md").read_text(encoding="utf-8"))
            )
        for part in parts:
            say(f"{part.option.removeprefix('--')}: {_upload(part, private)}")


def _check_name(option: str, repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{option} {repository}: {one_line(error, 160)}; write owner/name") from None
    if repository.count("/") != 1:
        raise UserError(f"{option} {repository}: write owner/name")


def _folder(run: Path, part: str) -> Path:
    folder = run / "checkpoint" / part
    if not folder.is_dir():
        more = "; only runs with scale.lora have one" if part == "adapter" else ""
        raise UserError(f"{folder}: not there{more}; leave --{part} out, or name the directory of a run")
    return folder


def _upload(part: Part, private: bool) -> str:
    """The address of the repository, once all is there."""
    if huggingface_hub.get_token() is None:
        raise UserError(
            f"{part.option} {part.repository}: there is no token: log in with hf auth login, or set HF_TOKEN"
        )
    api = HfApi()
    try:
        address = api.create_repo(part.repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(part.repository).private:
            raise UserError(
                f"{part.option} {part.repository}: exists and is public; name another, or leave --private out"
            )
        api.upload_folder(
            repo_id=part.repository,
            folder_path=part.folder,
            ignore_patterns=["README.md"],
            commit_message=f"The {part.option.removeprefix('--')} of a Paceline run",
        )
        api.upload_file(path_or_fileobj=part.card.encode(), path_in_repo="README.md", repo_id=part.repository)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = _REFUSALS.get(status, " ".join((error.server_message or str(error)).split())[:200])
        raise UserError(f"{part.option} {part.repository}: {reason}") from None
    except (httpx.HTTPError, OSError) as error:
        raise UserError(
            f"{part.option} {part.repository}: the hub cannot be reached ({one_line(error, 160)}); try again"
        ) from None
    return str(address)


def _policy_card(run: Path) -> str:
    facts = drafter_facts(run)
    front = ModelCardData(
        base_model=facts.base_model,
        license=facts.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["reinforcement-learning", "paceline"],
    )
    return f"""---
{front.to_yaml()}
---

# `{facts.base_model or facts.target}` after {facts.steps} RL steps

Trained with Paceline from `{facts.target}`; rollouts were sampled at temperature {facts.temperature:g}.
"""


def _adapter_card(run: Path, say: Callable[[str], None]) -> str:
    facts, folder = drafter_facts(run), _folder(run, "adapter")
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))[
            "base_model_name_or_path"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'adapter_config.json'}: {type(error).__name__}: {error}; push another run"
        ) from None
    base_model = hub_id(str(base), run)
    if base_model is None:
        say(
            f"the adapter's base is {base}, which only this machine has: who loads the adapter must name "
            "their own copy"
        )
    front = ModelCardData(
        base_model=base_model or facts.base_model,
        license=facts.license,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "base_model:adapter", "reinforcement-learning", "paceline"],
    )
    return f"""---
{front.to_yaml()}
---

# LoRA adapter of `{facts.base_model or facts.target}` after {facts.steps} RL steps

Trained with Paceline. `AutoPeftModelForCausalLM.from_pretrained` loads it with its base.
"""
