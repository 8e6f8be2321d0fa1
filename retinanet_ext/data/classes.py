"""Whether a data set and a model speak of the same things."""

from collections.abc import Collection, Iterable

from .dataset import DatasetError

# More names than this are not listed in a message.
_LISTED = 20


def check_classes(name: str, class_names: Collection[str], found: Iterable[str]) -> None:
    """Raises DatasetError where the data set `name` has classes (`found`), and none is one of the model's
    (`class_names`): a score on it would mean nothing."""
    own = list(dict.fromkeys(found))
    if own and not set(own) & set(class_names):
        raise DatasetError(
            f"{name}: none of its classes is one of the model's: the model has {_listed(class_names)}; "
            f"the data set has {_listed(own)}"
        )


def _listed(names: Collection[str]) -> str:
    shown = list(names)[:_LISTED]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more
