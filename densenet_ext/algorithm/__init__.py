"""The mathematics of the fused units: dense block, single dense layer, transition, stem, head and concatenation.

Plain functions over rows, and what carries them to autograd (``unit``) and to the compiler (``graph_ops``). Nothing
here knows modules. ``densenet_ext.reference`` has the same functions in the usual formulation.
"""
