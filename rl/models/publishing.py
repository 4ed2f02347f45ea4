"""Uploads a run's policy, adapters and drafter to the Hugging Face hub."""

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

_STATUS_REASONS = {
    401: "the hub does not accept the token: log in again with hf auth login, or set HF_TOKEN",
    403: "the token has no write access to this repository: use one that has, or choose another name",
}


@dataclass(frozen=True, slots=True)
class Upload:
    """The files and the model card of one repository.

    Attributes:
        option: Command-line option that named the repository, such as ``--policy``.
        repository: Repository id, ``owner/name``.
        folder: Directory with the files; its ``README.md`` is not uploaded.
        card: Text of the ``README.md`` to upload instead.
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
    """Uploads a run's policy, adapter and drafter, each to a repository of its own.

    Missing repositories are created. Everything is read and checked before the first upload begins.

    Args:
        run: Directory of a run with a checkpoint.
        policy: Repository of the policy, ``owner/name``; None does not upload it.
        adapter: Repository of the LoRA adapter, ``owner/name``; None does not upload it.
        drafter: Repository of the drafter, ``owner/name``; None does not upload it.
        private: Whether to create private repositories, and to reject existing public ones.
        say: Function that is called with a line for each finished upload, and with warnings.

    Raises:
        UserError: If a repository name is invalid, the run lacks a part, there is no token or no write
            access, or the hub is unreachable.
        DrafterError: If the drafter's files are incomplete or broken.
    """
    options = {"--policy": policy, "--adapter": adapter, "--drafter": drafter}
    repositories = {option: repository for option, repository in options.items() if repository is not None}
    if not repositories:
        raise UserError("nothing to push: name repositories with --policy, --adapter or --drafter owner/name")
    if len(set(repositories.values())) < len(repositories):
        raise UserError(
            f"{', '.join(repositories)}: two parts cannot share a repository: name a different one for each"
        )
    for option, repository in repositories.items():
        _check_name(option, repository)
    with tempfile.TemporaryDirectory() as scratch:
        uploads = []
        if policy is not None:
            uploads.append(Upload("--policy", policy, _folder(run, "policy"), _policy_card(run)))
        if adapter is not None:
            uploads.append(Upload("--adapter", adapter, _folder(run, "adapter"), _adapter_card(run, say)))
        if drafter is not None:
            folder = export_drafter(run, Path(scratch) / "drafter", target=policy, name=drafter)
            uploads.append(
                Upload("--drafter", drafter, folder, (folder / "README.md").read_text(encoding="utf-8"))
            )
        for upload in uploads:
            say(f"{upload.option.removeprefix('--')}: {_send(upload, private)}")


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
        raise UserError(f"{folder}: does not exist{more}; leave --{part} out, or name the directory of a run")
    return folder


def _send(upload: Upload, private: bool) -> str:
    """Uploads files and model card, and returns the repository's address."""
    key = f"{upload.option} {upload.repository}"
    if huggingface_hub.get_token() is None:
        raise UserError(f"{key}: there is no token: log in with hf auth login, or set HF_TOKEN")
    api = HfApi()
    try:
        address = api.create_repo(upload.repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(upload.repository).private:
            raise UserError(f"{key}: exists and is public; name another, or leave --private out")
        api.upload_folder(
            repo_id=upload.repository,
            folder_path=upload.folder,
            ignore_patterns=["README.md"],
            commit_message=f"The {upload.option.removeprefix('--')} of a Paceline run",
        )
        api.upload_file(
            path_or_fileobj=upload.card.encode(), path_in_repo="README.md", repo_id=upload.repository
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = _STATUS_REASONS.get(status, " ".join((error.server_message or str(error)).split())[:200])
        raise UserError(f"{key}: {reason}") from None
    except (httpx.HTTPError, OSError) as error:
        raise UserError(f"{key}: the hub cannot be reached ({one_line(error, 160)}); try again") from None
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
            f"the adapter's base model is {base}, which exists only on this machine: anyone who loads the "
            "adapter has to name a copy of it"
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
