"""Times and memory of an update under a layout, by formula: no program is compiled.

A block's work comes from its configuration (block.py), its time on a card from three bounds
(work.py). fsdp.py and pipelined.py put blocks together to an update. experiments/lever_pipeline.py
compares them.
"""
