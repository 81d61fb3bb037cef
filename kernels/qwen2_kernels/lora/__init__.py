"""What LoRA adapters add to a projection, for a step whose tokens belong to many adapters."""
