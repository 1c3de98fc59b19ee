"""A model in memory: loading, hooks, streaming block by block, sampling, LoRA. Knows no recipe."""
