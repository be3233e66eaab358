"""Tokenizers: GPT-2's BPE, characters, a BPE trained on a corpus, and any Hugging Face tokenizer."""
