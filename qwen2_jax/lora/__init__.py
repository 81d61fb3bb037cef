"""LoRA adapters: reading PEFT's files (host arrays, no jax), and what the engine does with them."""
