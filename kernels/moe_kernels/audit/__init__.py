"""What every kernel compiles to, on GPUs that need not be there: python -m moe_kernels.audit."""

from moe_kernels.audit.cases import VARIANTS
from moe_kernels.audit.compile import LIMITS, compile_launch
from moe_kernels.audit.describe import describe
from moe_kernels.audit.elsewhere import compile_elsewhere

__all__ = ["LIMITS", "VARIANTS", "compile_elsewhere", "compile_launch", "describe"]
