"""Whole decoders, drawn from a grammar, and two evaluators in numpy: of a decode step's plain meaning, and of what a kernel does with its phases.

`decoders` has the grammar and `refused` what it must not say; `plain` and `phases` evaluate, by the arithmetic of `arithmetic`. Of mkdsl only the
operators and the graph are imported: nothing here knows how a kernel is lowered.
"""
