"""Training with routed experts in tiers: device, host memory, disk.

engine.py     the Engine                           step.py         one update, layer by layer
programs.py   the compiled stages and gradients    trunk.py        the state without its experts
rows.py       experts as rows, optimizer on rows   update_log.py   which updates a row lacks

store.py      all experts of a run, made of these parts:
  residency.py   which experts stay on the device
  chunks.py      how the budget is spent, residents
  buffers.py     two layers' matrices on the device
  updater.py     brings rows up to date            threads.py     the threads, and their spans
  row_io.py      reads and writes rows             writes.py      rows on their way down
  snapshot.py    start, restore, exchange          traffic.py     counters for metrics.jsonl
"""
