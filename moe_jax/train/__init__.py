"""The training program. The loop drives an engine and asks it for no details.

loop.py        a run from its first step to its last, resumable
task.py        what a run learns from              teacher.py    a task with a teacher
engine.py      what the loop asks of an engine     engines/      dense, tiered
step.py        gradient of a batch                 update.py     the one update of all engines
optimizer.py   schedule and update rule            state.py      the state, and a step's metrics
checks.py      what is refused before a run        upcycled.py   a student made from its teacher
checkpoint/    atomic, verified saves              evaluate.py   bits per byte on held-out text
metrics.py     one JSON line a step                progress.py   what the terminal shows
"""
