"""Decoding backends: the engine of this package, or vLLM, in this process or behind servers."""

from paceline.rollout.backends.base import Decoder, ServedBackend

__all__ = ["Decoder", "ServedBackend"]
