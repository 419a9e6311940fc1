"""The first minutes on a GPU, step by step under deadlines: python kernels/first_gpu.py."""
