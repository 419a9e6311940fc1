"""Which pipeline schedule wins where, and when fully sharded data parallelism does. Simulated."""
