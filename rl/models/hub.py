"""Downloads models and configs from the Hugging Face hub, and turns its failures into one-line errors."""

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

_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # weights, configs and tokenizers
_TIMEOUT_SECONDS = 5


class HubUnreachable(Exception):
    """Raised when the hub does not answer and its cache on this machine does not hold the file."""


@cache
def hub_answers() -> bool:
    """Returns whether the hub answers within five seconds, and remembers the answer for this process.

    The hub's own client would retry for minutes before giving up.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_SECONDS)
    except Exception:  # the client, a proxy and the network raise different types
        return False
    return True


def hub_snapshot(model: str) -> Path:
    """Returns a directory with a model's config, weights and tokenizer, from the hub or its local cache.

    Raises:
        HubUnreachable: If the hub does not answer and its cache does not hold the model.
        UserError: If the hub denies access or does not have the model.
    """
    with _one_line_errors(model):
        return Path(
            snapshot_download(
                model,
                allow_patterns=_MODEL_FILES,
                etag_timeout=_TIMEOUT_SECONDS,
                local_files_only=not hub_answers(),
            )
        )


def hub_config(model: str) -> Path:
    """Returns the path of a model's config.json, from the hub or its local cache.

    Raises:
        HubUnreachable: If the hub does not answer and its cache does not hold the file.
        UserError: If the hub denies access or does not have the model.
    """
    with _one_line_errors(model):
        return Path(
            hf_hub_download(
                model, "config.json", etag_timeout=_TIMEOUT_SECONDS, local_files_only=not hub_answers()
            )
        )


@contextmanager
def _one_line_errors(model: str) -> Iterator[None]:
    """Turns errors of the hub's client into a `UserError` of one line or into `HubUnreachable`."""
    key = f"policy.model {model!r}"
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{key} is gated: accept its licence at {constants.ENDPOINT}/{model}, then run hf auth login "
            "or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{key}: the Hugging Face hub does not have it, or it is private: check the spelling, or log in "
            "with hf auth login"
        ) from None
    except HFValidationError:
        raise UserError(
            f"{key}: neither a local directory nor the id of a model on the Hugging Face hub; write either"
        ) from None
    except LocalEntryNotFoundError:
        raise HubUnreachable from None
    except EntryNotFoundError:
        raise UserError(
            f"{key}: the hub's repository has no config.json, so transformers cannot load it: choose a model "
            "in transformers' format"
        ) from None
    except HfHubHTTPError as error:
        raise UserError(
            f"{key}: the Hugging Face hub refuses the request ({one_line(error)}); try again later"
        ) from None
    except OSError:
        raise HubUnreachable from None
