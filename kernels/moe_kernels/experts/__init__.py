"""The experts of a mixture: grouped SwiGLU with gathered inputs, forward and backward."""
