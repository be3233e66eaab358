"""Key/value caches: what attention reads of earlier tokens. `base.py` has the contract between a model and a cache.

cache                           who uses it                           why it exists
PrefixCache (prefix.py)         every prefill                         keeps prompts' keys and values for what follows
ExpandedPrefix (prefix.py)      an update, unless attention is        a prompt is forwarded once for its whole group,
                                compiled (`rlft.cpu.attention`)       and gradients flow back to it
PackedCache (packed.py)         prefill and update, our models        no arithmetic on padding, except in attention
DecodeCache (copied.py)         decoding: foreign models, and ours    a foreign model's attention wants all keys and
                                with one row for each prompt          values of a row in one tensor
SharedDecodeCache (shared.py)   decoding: groups, our models,         a prompt is read once for its group: six times as
                                in plain torch                        fast at prompts of 256, groups of 8, on a CPU
StaticCache (static.py)         decoding: our models on a GPU         a CUDA graph needs fixed sizes and addresses

The compiled decoder (`rlft.cpu.decode`) reads a PrefixCache and keeps the new tokens' keys and values itself.
"""
