"""Benchmarks of decoding: speed, drafters, verifiers, strategy selection, and vLLM as a peer."""
