"""Level 1: Megatron's layers built on the fused operators of ms_ops."""
