"""What bench.py measures: speed, memory, training, and the kernels of a GPU."""
