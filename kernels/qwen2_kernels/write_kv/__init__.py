"""Rotary embedding and the write of a step's keys and values into the paged pools."""
