"""Kernels for TPUs, through Pallas' Mosaic lowering; all that knows Mosaic is here.

Notation of every kernel: B batch, K key/value heads, D head width; S rows, padded to a
multiple of the tiles, with zeros; R rows of a tile, C columns; W is D padded to what the
lanes take. Arrays are heads first, `[B,K,S,W]`, so that the rows of a head are contiguous.
Keys are `k̃` of `pallas_kernels.scaling`. Segment ids are `[B,S/R,1,R]` for rows and
`[B,S/C,1,C]` for columns: a tile of them is a row of lanes.
"""
