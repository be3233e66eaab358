"""Data sets: sources of texts, and the prompts and blocks of tokens made of them."""
