"""The Qwen2 models as Flax NNX modules, and how their weights are read."""
