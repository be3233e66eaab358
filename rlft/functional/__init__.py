"""Pure functions of tensors: what the algorithms are composed of. Imports torch and the standard library only."""
