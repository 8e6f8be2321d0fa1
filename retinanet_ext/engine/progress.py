"""How far a command is, on standard error: a bar on a terminal, elsewhere a line now and then."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from retinanet_ext.data.extras import require

# Seconds from one line to the next where there is no terminal.
INTERVAL = 30.0

Item = TypeVar("Item")


class Progress:
    """Counts units of work, `done` of `total` to begin with. `unit`: what one is called. `quiet`: says nothing."""

    def __init__(self, total: int, unit: str, done: int = 0, quiet: bool = False):
        self.tqdm = require("tqdm").tqdm
        self.bar = self.tqdm(total=total, initial=done, unit=unit, disable=True if quiet else None)
        self.quiet = quiet
        self.total, self.unit, self.first, self.done = total, unit, done, done
        self.description = ""
        self.start = self.said = time.monotonic()

    def describe(self, text: str) -> None:
        """What stands ahead of the figures from now on."""
        self.description = text
        self.bar.set_description(text)

    def advance(self, **figures: str) -> None:
        """One unit more, and the figures it left."""
        self.done += 1
        if not self.bar.disable:
            self.bar.set_postfix(figures, refresh=False)
            self.bar.update()
        elif not self.quiet and time.monotonic() - self.said >= INTERVAL:
            self.said = time.monotonic()
            print(self._line(figures), file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        """A line on standard output, above the bar."""
        if not self.quiet:
            self.tqdm.write(text)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def _line(self, figures: dict[str, str]) -> str:
        return self.tqdm.format_meter(
            self.done,
            self.total,
            self.said - self.start,
            initial=self.first,
            ncols=0,  # the figures without a bar
            prefix=self.description,
            unit=self.unit,
            postfix=", ".join(f"{name}={value}" for name, value in figures.items()),
        )


def track(items: Iterable[Item], unit: str, description: str = "") -> Iterator[Item]:
    """`items`, which have a length, one by one with their progress."""
    with Progress(len(items), unit) as progress:
        if description:
            progress.describe(description)
        for item in items:
            yield item
            progress.advance()


def reading(images: Iterable[Item]) -> Iterator[Item]:
    """The images of a data set that is being opened, as `open_dataset(progress=...)` asks for them."""
    return track(images, "image", "reading the data set")


def memory_held(device: torch.device) -> str:
    """Memory of this process, in GiB: the most that torch has reserved on a GPU, or what is resident on the CPU now."""
    if device.type == "cuda":
        held = torch.cuda.max_memory_reserved(device)
    else:
        with open("/proc/self/statm", "rb") as stream:
            held = int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return f"{held / 2**30:.1f}G"
