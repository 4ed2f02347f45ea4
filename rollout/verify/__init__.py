"""Lossless verifiers: pure functions of the target's probabilities, the draft and uniform random numbers.

A new verifier is one file and one line in `VERIFIERS`.
"""

from paceline.rollout.verify.block import verify_block
from paceline.rollout.verify.chain import verify_chain
from paceline.rollout.verify.deterministic import verify_deterministic
from paceline.rollout.verify.outcome import Uniforms, Verification
from paceline.rollout.verify.recursive import verify_recursive
from paceline.rollout.verify.spectr import verify_spectr
from paceline.rollout.verify.verifier import StatedVerifier, Verifier, verifier

VERIFIERS: dict[str, Verifier] = {
    "chain": verify_chain,
    "block": verify_block,
    "recursive": verify_recursive,
    "spectr": verify_spectr,
}


def default_verifier(chain: bool) -> Verifier:
    """Returns the default verifier of drawn drafts: token by token for chains, recursive for trees."""
    return verify_chain if chain else verify_recursive


__all__ = [
    "VERIFIERS",
    "StatedVerifier",
    "Uniforms",
    "Verification",
    "Verifier",
    "default_verifier",
    "verifier",
    "verify_block",
    "verify_chain",
    "verify_deterministic",
    "verify_recursive",
    "verify_spectr",
]
