"""Kernels for CPUs, in C. They are compiled on the machine they run on; see `build`."""
