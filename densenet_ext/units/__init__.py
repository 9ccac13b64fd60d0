"""The way between modules and the algorithm: one reader from modules to values or to "why not", and one way in.

``parts`` looks at PyTorch's own modules, ``reading`` remembers what was seen, ``entry`` gives a module the class whose
``forward`` runs a unit, ``captures`` says when the single operations have to run, ``flow`` keeps eager's memory layout.
The units are in ``block`` and ``around``. Nothing here knows a library.
"""
