"""Control of the draft depth of a decoder whose steps cannot be timed in parts; nothing here imports vLLM."""
