"""Triton kernels of the fused head, and the functions that launch them.

Axis letters in names of sizes, blocks and comments:

    T  tokens: rows of the hidden states, and of every per-token vector
    H  hidden: the axis that the head's product sums over (R for the rank of a low-rank second pair)
    V  vocabulary: rows of the head's weight, columns of the logits

`vocab_size` is the size of the whole head, `local_vocab_size` the rows of the weight that a launch
receives: this rank's shard of the head, or a window of it that starts at `vocab_start`. A row's
anchor is the logit around which its exponents are taken: the target's, or a larger one where those
would overflow.

A tile of the logits is `[BLOCK_T, BLOCK_V]`. Every kernel that computes logits holds one tile of
them in registers, reduces it there, and writes either nothing, or the exponents, or the gradient of
the logits: never the logits themselves.

    operands.py      what the kernels read and write, by name
    arguments.py     records that a kernel takes as one argument each
    tuning.py        the tile for a card and a dtype
    product.py       how a tile of logits is accumulated: raster, products, bias, scale, softcap
    epilogue.py      what happens to it in registers: row sums, exponents, gradient
    head.py          the descriptor (persistent) and the pointer kernel around the two
    cooperative.py   the persistent kernel of Hopper cards, in Gluon, around the same epilogue
    last_product.py  a product that completes a float32 sum and rounds it, in Gluon
    hopper.py        what these two share: the ring of operands and the loop over it
    rows.py          which labels count, the label's logit, scaling by rows
    statistics.py    from the sums of tiles to the statistics of rows
    overflow.py      rows whose exponents overflowed, computed again around their maximum
"""
