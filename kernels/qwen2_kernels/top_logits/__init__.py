"""The largest logits of a row, in their order, and what its probabilities are divided by."""
