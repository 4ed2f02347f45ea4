"""Lossless verifiers: pure functions of (target probabilities, draft, uniforms)."""

from rollout.verify.chain import ChainUniforms, Verification, verify_chain
from rollout.verify.greedy import verify_greedy

__all__ = ["ChainUniforms", "Verification", "verify_chain", "verify_greedy"]
