"""Distillation of one head from another: their divergence, without the logits of either.

functional.py   the public functions of two heads
sparse.py       the divergence over a teacher's top K classes, from log-probabilities
validation.py   checks of their tensor arguments, once, at the door
reduction.py    from the divergence of every token to the loss
autograd.py     the divergence per token for autograd
ops.py          two heads as one opaque torch operator
"""
