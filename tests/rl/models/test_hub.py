"""What the Hugging Face hub says becomes one line, and a hub that does not answer costs no time."""

import time

import httpx
import pytest
from huggingface_hub import errors

from paceline.rl.dry_run.estimate import policy_config
from paceline.rl.errors import UserError
from paceline.rl.models import hub
from paceline.rl.models.policies import fetch_policy


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    hub.hub_answers.cache_clear()
    yield
    hub.hub_answers.cache_clear()


def refusal(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    return kind(
        "no",
        response=httpx.Response(
            status, request=httpx.Request("GET", "https://huggingface.co/api/models/a/b")
        ),
    )


CASES = [
    (refusal(errors.GatedRepoError, 403), "is gated: accept its licence at .*/a/b, then run hf auth login"),
    (refusal(errors.RepositoryNotFoundError, 404), "does not have it, or it is private"),
    (refusal(errors.RemoteEntryNotFoundError, 404), "transformers cannot load it"),
    (refusal(errors.HfHubHTTPError, 500), "refuses the request"),
    (errors.HFValidationError("bad"), "neither a local directory nor the id"),
]


@pytest.mark.parametrize(("error", "reason"), CASES, ids=[reason for _, reason in CASES])
def test_what_the_hub_says_is_one_line_in_a_run_and_in_its_check(monkeypatch, error, reason):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    for ask in (fetch_policy, policy_config):
        with pytest.raises(UserError, match=reason) as caught:
            ask("a/b")
        assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """Nothing listens at the address: neither the check nor the run waits for the client's retries."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    begin = time.monotonic()
    assert policy_config("nobody/nothing") is None
    with pytest.raises(UserError, match="the Hugging Face hub is not reachable"):
        fetch_policy("nobody/nothing")
    assert time.monotonic() - begin < 5
