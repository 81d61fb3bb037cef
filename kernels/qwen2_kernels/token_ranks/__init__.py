"""How many tokens of a row are likelier than those that are asked for."""
