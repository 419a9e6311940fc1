"""The one exception whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Input that cannot be used.

    The message is one line that names the offending value and the fix. Programs print it as
    `error: …` and end with exit code 2. Nothing has been compiled, written or lost by then.
    """


def require(condition: bool, message: str) -> None:
    """UserError(message) if `condition` is false."""
    if not condition:
        raise UserError(message)
