"""From a problem and a memory budget to a schedule: integers only, no device and no tensor.

problem.py     the record of one call: shapes, dtype, who needs a gradient, card, budget
cards.py       what was measured on a card, as data
workspace.py   the bytes that a schedule takes
divergence.py  the divergence of two heads: its problem, bytes and chunks
schedule.py    every way to run a problem, and the one that the model of cost prefers
"""
