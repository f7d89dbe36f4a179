"""Level 0: repairs of Megatron where TransformerEngine, Apex or CUDA are absent.

Each module holds one repair: the patches, the probe that finds the defect in the installed code,
and the functions that take its place. None changes what a correct path computes.
"""
