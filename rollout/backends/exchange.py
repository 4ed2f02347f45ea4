"""The exchange directory that a trainer and its vLLM servers share.

It holds new weights, and the token that weight updates need.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

# environment variable of a server: the only directory from which updates are read
DIRECTORY = "PACELINE_EXCHANGE"
# environment variable of a server, or of a trainer that cannot read the token's file
TOKEN = "PACELINE_UPDATE_TOKEN"


def token_file(directory: Path) -> Path:
    """Returns the path of an exchange directory's token."""
    return directory / "update-token"


def make_token(directory: Path) -> str:
    """Returns the token of ``directory``, and creates it if this is the first server to start there.

    Only the owner can read the token's file.

    Raises:
        OSError: The directory cannot be written.
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
        OSError: No server was started on this directory, or the file belongs to someone else.
        ValueError: The file is empty.
    """
    from_environment = os.environ.get(TOKEN)
    if from_environment:
        return from_environment
    path = token_file(directory)
    token = path.read_text(encoding="utf-8").strip()
    if not token:
        raise ValueError(f"{path} is empty: delete it and start the servers again")
    return token


def confined(path: str) -> Path:
    """Returns ``path``, resolved, if it is a safetensors file in the exchange directory of this process.

    Raises:
        ValueError: The path is any other, including links that lead out of the directory.
    """
    directory = os.environ.get(DIRECTORY)
    if directory is None:
        raise ValueError(
            f"this server takes no new weights, so it does not read {path}: start it with paceline serve RUN "
            "--exchange DIRECTORY"
        )
    resolved = Path(path).resolve()
    if resolved.suffix != ".safetensors" or not resolved.is_relative_to(Path(directory).resolve()):
        raise ValueError(
            f"{path} is not a safetensors file in {directory}: set rollout.vllm.exchange to the server's "
            "--exchange"
        )
    return resolved
