"""Training in a pipeline: each device has its share of the layers, and micro-batches go through."""
