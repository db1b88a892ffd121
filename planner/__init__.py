"""Compiles runs for TPU pods and GPUs that need not be present: memory, FLOPs, traffic."""
