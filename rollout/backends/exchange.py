"""The directory that a trainer and its vLLM servers share: it holds new weights, and the token that updates
need.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

# environment variable of a server: updates are read from this directory alone
DIRECTORY = "PACELINE_EXCHANGE"
# environment variable of a server, or of a trainer that cannot read the token's file
TOKEN = "PACELINE_UPDATE_TOKEN"


def token_file(directory: Path) -> Path:
    """Returns where the token of an exchange directory is kept."""
    return directory / "update-token"


def make_token(directory: Path) -> str:
    """Returns the token of ``directory``; the first server to start there writes it, readable by its owner
    alone.

    Raises:
        OSError: when the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = token_file(directory)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32))
    except FileExistsError:
        pass
    return read_token(directory)


def read_token(directory: Path) -> str:
    """Returns the token that servers on ``directory`` ask for.

    Raises:
        OSError: when no server was started on this directory, or the file belongs to someone else.
        ValueError: for an empty file.
    """
    given = os.environ.get(TOKEN)
    if given:
        return given
    path = token_file(directory)
    token = path.read_text(encoding="utf-8").strip()
    if not token:
        raise ValueError(f"{path}: empty; delete it and start the servers again")
    return token


def confined(path: str) -> Path:
    """Returns ``path``, resolved, where it is a safetensors file in the exchange directory of this process.

    Raises:
        ValueError: for every other path, links out of the directory included.
    """
    directory = os.environ.get(DIRECTORY)
    if directory is None:
        raise ValueError(
            "this server takes no new weights: start it with paceline serve RUN --exchange DIRECTORY, not "
            f"for {path}"
        )
    found = Path(path).resolve()
    if found.suffix != ".safetensors" or not found.is_relative_to(Path(directory).resolve()):
        raise ValueError(
            f"{path}: not a safetensors file in {directory}; set rollout.vllm.exchange to the server's "
            "--exchange"
        )
    return found
