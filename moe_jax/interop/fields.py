"""Settings of a published model, each checked as it is read.

They come from a file that anyone may have written, so no value is used before its type and size
are known.
"""

from typing import Any

from moe_jax.base.errors import UserError, quote


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
            raise self._wrong(name, value, f"it must be above 0 and at most {most:g}")
        return value

    def integer(self, name: str, default: Any = None) -> int:
        """A whole number above 0 and at most a million, which bounds the model's size."""
        value = self.number(name, default)
        if value != int(value):
            raise self._wrong(name, value, "a whole number is needed")
        return int(value)

    def count(self, name: str, default: Any = None) -> int:
        """A whole number from 0 up to a million."""
        value = self.get(name, default)
        return 0 if type(value) is int and value == 0 else self.integer(name, default)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        return self._of_type(name, default, bool, "true or false")

    def names(self) -> set[str]:
        """Names of all fields that are not null."""
        return {name for name, value in self._values.items() if value is not None}

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        return self._of_type(name, default, str, "a text")

    def object(self, name: str) -> dict[str, Any]:
        """An object; empty by default."""
        return self._of_type(name, {}, dict, "an object")

    def entries(self, name: str) -> list[Any]:
        """A list of numbers or strings; empty by default."""
        value = self._of_type(name, [], list, "a list")
        if not all(isinstance(v, int | str) for v in value):
            raise self._wrong(name, value, "a list of numbers or texts is needed")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings; empty by default."""
        value = self.entries(name)
        if not all(isinstance(v, str) for v in value):
            raise self._wrong(name, value, "a list of texts is needed")
        return value

    def _of_type(self, name: str, default: Any, kind: type, words: str) -> Any:
        value = self.get(name, default)
        if not isinstance(value, kind):
            raise self._wrong(name, value, f"{words} is needed")
        return value

    def _wrong(self, name: str, value: Any, need: str) -> UserError:
        return UserError(f"{self._prefix}{name} is {quote(value)}: {need}")
