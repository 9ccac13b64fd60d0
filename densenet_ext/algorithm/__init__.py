"""The mathematics of the fused units: dense block, single dense layer, transition, stem, head and concatenation.

Plain functions over rows; ``operation`` takes them to autograd and to the compiler, ``values`` has what they are given.
Nothing here knows modules, but for ``norm``, which reads a BatchNorm. ``densenet_ext.reference`` has the same functions
in the usual formulation.
"""
