"""Triton kernels for GPUs, written in Pallas; all code that depends on Triton is here.

Notation of every kernel: B sequences, S tokens, K KV heads, D head dimension; R rows of a block
and C columns of a tile (powers of two); N = ⌈S/R⌉ blocks; W, the width of a tile, is D rounded up
to a power of two or the sum of two (`parts.widths`). Keys are the `k̃` of `pallas_kernels.scaling`.

Every kernel of `precondition` is under its own `jit`. A program that calls a kernel in several
places, such as both passes or several layers, then contains and compiles it once. Traced inline,
the copies would differ in the names of their call sites, which are part of the compiler's input.
"""
