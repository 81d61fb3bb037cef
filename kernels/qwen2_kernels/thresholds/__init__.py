"""The cuts that top-k and top-p make in a row of logits, without sorting it."""
