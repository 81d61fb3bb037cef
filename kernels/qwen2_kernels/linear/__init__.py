"""A projection of a few tokens with its norm before and its bias, activation or residual behind it."""
