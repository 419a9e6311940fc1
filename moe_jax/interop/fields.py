"""Settings of a published model, each checked as it is read.

They come from a file that anyone may have written, so no value is used before its type and size
are known.
"""

from typing import Any

from moe_jax.base.errors import UserError


class Fields:
    """The metadata of a file by name. An absent field and a null one take the default.

    Every method raises a UserError that names the field and its value.
    """

    def __init__(self, values: dict[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it is."""
        value = self._values.get(self._prefix + name)
        return default if value is None else value

    def number(self, name: str, default: Any = None, *, most: float = 1e6) -> Any:
        """A number above 0 and at most `most`."""
        value = self.get(name, default)
        # True is an int in Python, and NaN fails every comparison.
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or not 0 < value <= most:
            raise UserError(
                f"{self._prefix}{name} is {value!r}: it must be above 0 and at most {most:g}"
            )
        return value

    def integer(self, name: str, default: Any = None) -> int:
        """A whole number above 0 and at most a million, which bounds the model's size."""
        value = self.number(name, default)
        if value != int(value):
            raise UserError(f"{self._prefix}{name} is {value!r}: a whole number is needed")
        return int(value)

    def flag(self, name: str) -> bool:
        """True or false; false by default."""
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise UserError(f"{self._prefix}{name} is {value!r}: true or false is needed")
        return value

    def list(self, name: str) -> list[Any]:
        """A list of numbers or strings; empty by default."""
        value = self.get(name) or []
        if not isinstance(value, list) or not all(isinstance(v, int | str) for v in value):
            raise UserError(f"{self._prefix}{name} is {value!r}: a list is needed")
        return value
