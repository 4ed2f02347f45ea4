"""The update's arithmetic on the engine's own kernels, on CPUs in bfloat16."""
