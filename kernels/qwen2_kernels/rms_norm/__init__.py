"""The root-mean-square norm of the residual stream, with the addition in front of it."""
