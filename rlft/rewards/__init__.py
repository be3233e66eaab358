"""Rewards, one in each file, with TRL's call signature; `compose.py` adds them up.

A reward is a callable with the keywords `prompts`, `completions` (B strings each), `completion_ids` (B lists of token
ids, which include a generated end token) and every other column of the data (lists of B values). It returns one float
for each completion, or None for "not counted". A token-level reward returns a list of floats for each completion. The
signature of a reward names the keywords that it reads; `**columns` takes the others.
"""
