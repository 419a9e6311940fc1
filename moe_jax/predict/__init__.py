"""Predictions for hardware that is not here: programs compiled for it, read and priced."""
