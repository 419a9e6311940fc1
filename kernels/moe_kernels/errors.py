"""Failures as one line."""


def first_line(error: BaseException) -> str:
    """An error's type and the beginning of its message, or the end of one that is a traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    line = lines[-1] if "Traceback" in lines[0] else lines[0]
    return f"{type(error).__name__}: {line[:300]}"
