"""Lossless verifiers: pure functions of what the target says, the draft, and uniforms."""

from rollout.verify.chain import ChainUniforms, verify_chain
from rollout.verify.deterministic import Verification, verify_deterministic

__all__ = ["ChainUniforms", "Verification", "verify_chain", "verify_deterministic"]
