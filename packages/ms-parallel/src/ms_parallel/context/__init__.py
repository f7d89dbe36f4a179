"""Attention over a sequence that several processes hold.

A plan (`plan_attention`) says what every process computes and sends; `context_attention` runs it.
"""
