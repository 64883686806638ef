"""Mosaic kernels for TPUs, written in Pallas; all code that depends on Mosaic is here.

Notation of every kernel: B sequences, K KV heads, M = B·K systems, D head dimension; S tokens,
zero-padded to a multiple of the tiles; R rows and C columns of a tile; W is D padded to 64 lanes or
a multiple of 128. Arrays are heads first, `[M,S,W]`, so that the rows of a head are contiguous.
Keys are the `k̃` of `pallas_kernels.scaling`. Segment ids are `[B,S/R,1,R]` for rows and
`[B,S/C,1,C]` for columns, so that the ids of a tile are one row of lanes.
"""
