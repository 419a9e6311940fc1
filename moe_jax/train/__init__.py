"""The training program. The loop drives an engine and asks it for no details.

loop.py       all of it, in order; resumes        engine.py      the Protocol of an engine
engines/      dense and tiered runs               task.py        objective and batches of a run
teacher.py    a teacher's objective and batches   upcycled.py    a start from a dense model
step.py       one pure step of a dense run        update.py      clip, optimizer, router bias
optimizer.py  schedule and update rule            state.py       what a step changes
evaluate.py   bits per byte on held-out text      metrics.py     one JSON line a step
checkpoint.py atomic, verified saves              checks.py      what a run refuses at its start
progress.py   what the terminal shows
"""
