"""Lossless verifiers: pure functions of what the target says, the draft, and uniforms. A new one is one file and one line here."""

from collections.abc import Callable

import torch

from rollout.trees import DraftTree
from rollout.verify.block import verify_block
from rollout.verify.chain import verify_chain
from rollout.verify.deterministic import verify_deterministic
from rollout.verify.outcome import Uniforms, Verification
from rollout.verify.recursive import verify_recursive
from rollout.verify.spectr import verify_spectr

Verifier = Callable[[torch.Tensor, DraftTree, Uniforms], Verification]

VERIFIERS: dict[str, Verifier] = {
    "chain": verify_chain,
    "block": verify_block,
    "recursive": verify_recursive,
    "spectr": verify_spectr,
}

__all__ = [
    "VERIFIERS",
    "Uniforms",
    "Verification",
    "Verifier",
    "verify_block",
    "verify_chain",
    "verify_deterministic",
    "verify_recursive",
    "verify_spectr",
]
