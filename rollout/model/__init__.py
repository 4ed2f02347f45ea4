"""The policy's forwards as the engine runs them: KV cache, attention, fused layers and captured graphs."""
