"""Failures as one line."""


def first_line(error: BaseException) -> str:
    """An error's type and the beginning of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
