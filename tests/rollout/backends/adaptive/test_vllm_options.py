"""The environment variable is read strictly: an error is one line that names the key."""

from pathlib import Path

import pytest

from paceline.rollout.backends.adaptive.vllm_options import VARIABLE, VllmOptions, options_from_environment


def test_every_key_is_read(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert options_from_environment() is None
    monkeypatch.setenv(
        VARIABLE,
        '{"speculative": {"method": "ngram"}, "adaptive": false, "state": "/var/x", "probe_seconds": 5, '
        '"suffix_tokens": 9}',
    )
    assert options_from_environment() == VllmOptions({"method": "ngram"}, False, Path("/var/x"), 5, 9)
    monkeypatch.setenv(VARIABLE, "{}")
    assert options_from_environment() == VllmOptions()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ('{"stat": "x"}', "'stat' is unknown: write one of speculative, adaptive, state, probe_seconds"),
        ('{"speculative": "ngram"}', 'speculative is "ngram": write'),
        ('{"adaptive": 1}', "adaptive is 1: write true or false"),
        ('{"state": ""}', 'state is "": write'),
        ('{"probe_seconds": true}', "probe_seconds is true: write"),
        ('{"probe_seconds": 0}', "probe_seconds is 0: write"),
        ('{"suffix_tokens": 0}', "suffix_tokens is 0: write"),
        ('{"suffix_tokens": 1e6}', "suffix_tokens is 1000000.0: write"),
    ],
)
def test_an_error_is_one_line_that_names_the_key(text, named):
    with pytest.raises(ValueError, match="PACELINE_VLLM") as error:
        VllmOptions.parse(text)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
