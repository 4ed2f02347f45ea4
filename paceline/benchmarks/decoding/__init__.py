"""Benchmarks of decoding: speed, drafters, verifiers, strategy selection, vLLM as a peer, and one GPU."""
