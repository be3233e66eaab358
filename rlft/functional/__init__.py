"""The mathematics of the algorithms: pure functions of tensors, which import only torch and the standard library."""
