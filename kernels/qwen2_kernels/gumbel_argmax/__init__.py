"""A random token of each row by its softmax: the largest logit with Gumbel noise, drawn where the logits are read."""
