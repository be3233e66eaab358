"""Every online algorithm against exact answers, on tasks that can be enumerated: rlft verify (`run`).

`tasks`, `policy` and `exact` are what the answers come from, `formulas` and `weights` the papers' formulas as loops;
`groups`, `sampled`, `neural`, `refill`, `divergence`, `invariance` and `training` each measure one kind of property.
"""
