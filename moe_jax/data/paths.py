"""The files that a pattern names: a glob, in which a folder that exists stands for itself.

The standard library's glob follows links without an end, and takes every bracket for a wildcard.
"""

import glob
import os
from collections import deque
from collections.abc import Iterator
from fnmatch import fnmatchcase

EVERYTHING_BELOW = ["**", "*"]


def root_and_parts(pattern: str) -> tuple[str, list[str]]:
    """The folder at which a pattern begins to vary, and the parts of the pattern below it.

    `~` expands. A pattern that names a folder stands for everything below that folder.
    """
    root, parts = _start(pattern)
    while len(parts) > 1 and _is_literal(os.path.join(root, parts[0]), parts[0]):
        root = os.path.join(root, parts.pop(0))
    (last,) = parts[-1:] or [""]
    if _is_literal(os.path.join(root, last), last) and os.path.isdir(os.path.join(root, last)):
        return os.path.join(root, last).rstrip("/") or "/", EVERYTHING_BELOW
    return root, [*parts, "*"] if last == "**" else parts


def _start(pattern: str) -> tuple[str, list[str]]:
    """The folder from which the pattern counts, and all its parts."""
    first, _, rest = pattern.partition("/")
    home = os.path.expanduser(first)
    if home != first:  # its name may have wildcards, which are none here
        start = home
    else:
        start = "/" if pattern.startswith("/") else os.getcwd()
        rest = pattern
    return start, [part for part in rest.split("/") if part not in ("", ".")]


def _is_literal(path: str, part: str) -> bool:
    """Whether `part`, the last part of `path`, is a name and no pattern.

    An existing folder is meant by its name, and so is an existing file with brackets. `*.txt` stays
    a pattern where a file of that very name exists.
    """
    if not glob.has_magic(part):
        return True
    return part not in ("*", "**") and (
        os.path.isdir(path) or ("[" in part and os.path.lexists(path))
    )


class Matches:
    """The files below `root` that match `parts`. Iterating gives their names from `root`.

    A name may come twice. `**` enters each real folder once. Links to folders are entered last and
    only if that leads to a new folder. `links` has those that were not entered, `unreadable` the
    folders that may not be read, and `broken` the links that lead nowhere.
    """

    def __init__(self, root: str, parts: list[str]) -> None:
        self.root = root
        self.links: list[str] = []
        self.unreadable: list[str] = []
        self.broken: list[str] = []
        self._parts = parts
        self._walked: set[tuple[int, int, int]] = set()
        """Folders that a `**` has entered: the place of the `**` in the pattern, device, inode."""

    def __iter__(self) -> Iterator[str]:
        for name in self._expand("", self._parts):
            path = os.path.join(self.root, name)
            if os.path.isfile(path):
                yield name
            elif os.path.islink(path) and not os.path.exists(path):
                self.broken.append(name)

    def _expand(self, name: str, parts: list[str]) -> Iterator[str]:
        """Everything below `name` that matches the parts."""
        if not parts:
            yield name
            return
        part = parts[0]
        path = os.path.join(self.root, name, part)
        if part == "**":
            for below in self._walk(name, len(parts)):
                yield from self._expand(below, parts[1:])
        elif _is_literal(path, part):
            yield from self._expand(os.path.join(name, part), parts[1:])
        else:
            yield from self._matching(name, parts)

    def _matching(self, name: str, parts: list[str]) -> Iterator[str]:
        """As `_expand`, for a first part with wildcards."""
        for entry in self._entries(name):
            # As in a shell, wildcards do not match the dot of a hidden name.
            hidden = entry.name.startswith(".") and not parts[0].startswith(".")
            if hidden or not fnmatchcase(entry.name, parts[0]):
                continue
            found = os.path.join(name, entry.name)
            if parts[1:] and entry.is_symlink() and self._leads_up(found):
                self.links.append(found)
            else:
                yield from self._expand(found, parts[1:])

    def _walk(self, name: str, place: int) -> Iterator[str]:
        """`name` and the folders below it, each real folder once, hidden ones left out."""
        folders = deque([name])
        links: deque[str] = deque()
        while folders or links:
            # Links come last: a folder is then read under its own name, if that is below, too.
            is_link = not folders
            here = links.popleft() if is_link else folders.popleft()
            if (is_link and self._leads_up(here)) or not self._is_new(here, place):
                self.links += [here] * is_link
                continue
            yield here
            for entry in self._entries(here):
                below = os.path.join(here, entry.name)
                if not entry.name.startswith(".") and os.path.isdir(entry):
                    (links if entry.is_symlink() else folders).append(below)

    def _is_new(self, name: str, place: int) -> bool:
        """Whether this is a folder that the `**` at this place enters for the first time."""
        path = os.path.join(self.root, name)
        if not os.path.isdir(path):
            return False
        status = os.stat(path)
        key = (place, status.st_dev, status.st_ino)
        is_new = key not in self._walked
        self._walked.add(key)
        return is_new

    def _entries(self, name: str) -> list[os.DirEntry[str]]:
        """What is in a folder: nothing if it is no folder or may not be read."""
        try:
            with os.scandir(os.path.join(self.root, name)) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except PermissionError:
            self.unreadable.append(name)
            return []

    def _leads_up(self, name: str) -> bool:
        """Whether this link leads to the folder that it lies in, or to one above."""
        path = os.path.join(self.root, name)
        parent = os.path.realpath(os.path.dirname(path))
        target = os.path.realpath(path)
        return os.path.commonpath([parent, target]) == target
