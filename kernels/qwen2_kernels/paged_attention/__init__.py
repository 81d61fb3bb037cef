"""Attention of a step's queries over the paged pools: decode and ragged (chunked) prefill."""
