"""Kernels for GPUs, through Pallas' Triton lowering; all that knows Triton is here.

Notation of every kernel: B batch, S length, K key/value heads, D head width; R rows of a
block and C columns of a tile (powers of two); N = ⌈S/R⌉ blocks; W is D rounded up to a
power of two, the width of a tile. Keys come normalised and scaled, `k̃ = k̂·√(log₂e/√D)`,
so that `A_ij = 2^(k̃_i·k̃_j − c)` with `c = √D·log₂e`, which is the largest exponent.

Every kernel of `precondition` is under `jit` of its own. A program that calls one in several
places, such as both passes or several layers, then holds it once, and it is compiled once: traced
in each place it would differ in the names of that place, which are part of what compilers get.
"""
