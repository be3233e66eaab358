"""Data sets: sources of texts, and the prompts, examples and blocks of tokens that are made from them."""
