"""Steps of a program before it imports JAX."""

import os
import sys


def ask_for_huge_pages() -> None:
    """Restarts this program, once, with glibc's allocator asking Linux for huge pages.

    XLA's CPU backend allocates its temporary buffers anew for every step, so each step faults all
    of their pages in again. With 2 MiB pages that costs almost nothing: the training step of `tiny`
    takes 0.8 of the time (experiments/training_speed.py measures both). glibc reads the setting
    when a process starts, hence the restart. Nothing happens on other systems, nor where
    GLIBC_TUNABLES is set already.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    # The variable also marks the restarted process, which must not restart again.
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    sys.stdout.flush()  # execv drops what Python has buffered
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def for_absent_gpus() -> None:
    """The environment of a program that compiles for GPUs that are not here.

    Triton's interpreter compiles nothing, and JAX would look for a GPU.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
