"""`rlft verify`: every online algorithm against exact answers, on tasks whose completions can all be listed.

`enumerable`, `policy` and `exact` give the answers; `formulas` and `token_weights` are the papers' formulas as loops;
`groups`, `sampled`, `neural`, `refill`, `divergence`, `invariance` and `training` each measure one kind of property.
"""
