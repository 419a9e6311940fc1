"""Steps that hang, crash and raise, for the worker process of test_first_gpu.py."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import ModuleType

from moe_kernels.first_gpu import worker
from moe_kernels.first_gpu.context import Outcome

MEASUREMENT = {"name": "half", "value": 0.5, "unit": "s"}


def right(context):
    """Says which process it is."""
    context.report(MEASUREMENT)
    return Outcome(True, details={"process": os.getpid()})


def hang(context):
    """Waits inside of C with Python's lock held, as in a compiler. No exception reaches it."""
    context.report(MEASUREMENT)
    ctypes.PyDLL(None).sleep(1000)


def leave_a_child(context):
    """Starts a program and hangs."""
    command = [sys.executable, "-c", "import time; time.sleep(1000)"]
    child = subprocess.Popen(command, process_group=0)
    context.report({**MEASUREMENT, "value": child.pid})
    time.sleep(1000)


def crash(context):
    """Dies as by an access to memory that is not there."""
    os.kill(os.getpid(), signal.SIGSEGV)


def error(context):
    """Raises, as after an error of CUDA."""
    raise RuntimeError("illegal address\nmore")


def serve(*arguments):
    """The worker with these steps instead of the real ones."""
    module = ModuleType("moe_kernels.first_gpu.steps")
    steps = (right, hang, leave_a_child, crash, error)
    vars(module)["STEPS"] = {step.__name__: step for step in steps}
    sys.modules[module.__name__] = module
    worker.serve(*arguments)
