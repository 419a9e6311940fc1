"""A hyper-parameter search over an experiment's settings, shared by any number of workers.

In the order of use: axes.py (what is searched), command.py (a checked command line), trials.py (the
study that the workers share, in storage.py with locks.py), worker.py (runs trials), report.py
(table, result.json), figures.py.
"""
