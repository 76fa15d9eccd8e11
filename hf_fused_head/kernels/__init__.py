"""Triton kernels of the fused head; of this package they import `distributed` alone.

Axis letters in names of sizes, blocks and comments:

    T  tokens: rows of the hidden states, and of every per-token vector
    H  hidden: the axis that the head's product sums over (R for the rank of a low-rank second pair)
    V  vocabulary: rows of the head's weight, columns of the logits

A tile of the logits is `[BLOCK_T, BLOCK_V]`. Every kernel that makes logits makes a tile of them in
registers, reduces it there, and writes either nothing, or the exponents, or the gradient of the
logits: never the logits themselves.

    call.py        the tensors of one call, and memory for what is made from them
    operands.py    what the kernels read and write, by name
    product.py     how a tile of logits is accumulated: raster, products, bias, scale, softcap
    epilogue.py    what happens to it in registers: row sums, exponents, gradient
    head.py        the persistent (descriptor) and the plain (pointer) kernel around the two
    pingpong.py    the persistent kernel of Hopper cards, in Gluon, around the same epilogue
    last_product.py  a product that completes a float32 sum and rounds it, in Gluon
    hopper.py      what these two share: the ring of operands and the loop over it
    rows.py        which labels count, the logit of the label, scaling by row
    statistics.py  sums of tiles to statistics of rows
    overflow.py    rows whose exponents overflowed, made again around their maximum
    merging.py     sums of the tiles of all ranks, for a head that is cut along the vocabulary
    factors.py     what a row of the logits' gradient is made of
    gradients.py   stored tiles to gradients, by cuBLAS and `last_product`
    passes.py      the passes of one call, in the order that a schedule asks for
    tuning.py      which tile a card and a dtype get
"""
