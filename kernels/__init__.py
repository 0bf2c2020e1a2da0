"""The Triton kernels, one file an operation; installed as ``fastperc.kernels``."""
