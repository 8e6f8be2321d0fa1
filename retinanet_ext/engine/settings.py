"""Errors of settings that are wrong in themselves, and the checks that several commands share."""

from collections.abc import Sequence
from typing import Any


class UsageError(ValueError):
    """Arguments that are missing, contradict each other or have a wrong value, whatever the files they name hold."""


class SettingError(UsageError):
    """A wrong value. `names`: the settings it concerns; `text`: what was expected and what came."""

    def __init__(self, names: str | Sequence[str], text: str):
        self.names = (names,) if isinstance(names, str) else tuple(names)
        self.text = text
        super().__init__(f"{', '.join(self.names)}: {text}")


def check_count(name: str, value: int, least: int = 1) -> None:
    if not value >= least:
        raise SettingError(name, f"expected an integer >= {least}, got {value!r}")


def check_probability(name: str, value: float, what: str = "a probability") -> None:
    if not 0 <= value <= 1:
        raise SettingError(name, f"expected {what} in [0, 1], got {value!r}")


def check_sizes(names: Sequence[str], shorter: Sequence[Any], longer: Any) -> None:
    """What an image's shorter side is resized to (one, or several to draw from), and the limit of the longer one."""
    if not shorter or min(shorter) < 1:
        raise SettingError(names[0], f"expected numbers of pixels >= 1, got {_listed(shorter)}")
    check_count(names[1], longer)
    if max(shorter) > longer:
        raise SettingError(names, f"expected the first at most the second, got {_listed(shorter)} and {longer}")


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values)) or "none"
