"""Rewards, one a file, each with TRL's call signature; `compose.py` adds them up.

A reward is anything that is called with the keywords `prompts`, `completions` (B strings each), `completion_ids`
(B lists of token ids; an end token that was generated is among them) and every other column of the data (lists of B
values), and that returns one float, or None for "not counted", for each completion.
"""
