"""The operator names and signatures of MindSpeed, one module each, on `ms_ops`."""
