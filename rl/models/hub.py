"""The Hugging Face hub: whether it answers, and why it does not hand out a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_session

from paceline.rl.errors import UserError, one_line

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


class HubUnreachable(Exception):
    """The hub does not answer, and its cache on this machine does not hold what was asked for."""


@cache
def hub_answers() -> bool:
    """Whether the hub answers, asked once within five seconds: its own client would retry for minutes."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the client, a proxy or the network raises
        return False
    return True


def hub_snapshot(model: str) -> Path:
    """A directory with a model's config, weights and tokenizer, from the hub or its cache on this machine.

    Raises:
        HubUnreachable: when neither can be had.
        UserError: when the hub says no.
    """
    with _reasons(model):
        return Path(
            snapshot_download(
                model, allow_patterns=_PATTERNS, etag_timeout=5, local_files_only=not hub_answers()
            )
        )


def hub_config(model: str) -> Path:
    """A model's config.json, from the hub or its cache on this machine.

    Raises:
        HubUnreachable: when neither can be had.
        UserError: when the hub says no.
    """
    with _reasons(model):
        return Path(hf_hub_download(model, "config.json", etag_timeout=5, local_files_only=not hub_answers()))


@contextmanager
def _reasons(model: str) -> Iterator[None]:
    """Turns what the hub's client raises into one line."""
    named = f"policy.model {model!r}"
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{named} is gated: accept its licence at {constants.ENDPOINT}/{model}, then run hf auth login "
            "or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{named}: the Hugging Face hub does not have it, or not for you: check the spelling, and log in "
            "with hf auth "
            "login where it is private"
        ) from None
    except HFValidationError:
        raise UserError(
            f"{named}: neither a local directory nor the id of a model on the Hugging Face hub"
        ) from None
    except LocalEntryNotFoundError:
        raise HubUnreachable from None
    except EntryNotFoundError:
        raise UserError(
            f"{named}: the hub's repository has no config.json: it is no model of transformers"
        ) from None
    except HfHubHTTPError as error:
        raise UserError(f"{named}: the Hugging Face hub refuses it ({one_line(error)})") from None
    except OSError:
        raise HubUnreachable from None
