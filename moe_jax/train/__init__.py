"""The training program.

optimizer.py  schedule and update rule            checkpoint.py  atomic, verified saves
objective.py  the loss of one batch               metrics.py     one JSON line a step
step.py       one pure update                     progress.py    what the terminal shows
evaluate.py   bits per byte on held-out text      report.py      plots, samples, result.json
loop.py       all of it, in order; resumes        trained.py     a run loaded again
"""
