"""Memory features at optimization level 2: one file each, over ms_memory."""
