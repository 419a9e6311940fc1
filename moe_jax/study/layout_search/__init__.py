"""The search of experiments/predict.py --search: which layout is the fastest that fits?

In the order of use: candidates.py (what there is), estimates.py (a lower bound of memory, and the
order), tries.py (one candidate as a process of its own), search.py (all of it within its time),
report.py (table, CSV, result.json), figures.py.
"""
