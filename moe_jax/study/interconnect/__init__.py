"""When software replaces a faster link between GPUs, and when it cannot. Predicted."""
