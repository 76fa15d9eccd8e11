"""The engines: implementations of one protocol that never import one another.

protocol.py     what an engine takes and returns
select.py       which engine a name means for given tensors, and why
reference.py    all logits in memory: the definition of correct
torch_engine/   bounded memory on any device, by torch operations
triton_engine/  the host side of the kernels: passes over chunks and windows, products, schedules
"""
