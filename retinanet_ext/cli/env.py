"""`retinanet-ext env`: versions, build and devices."""

from .options import new_command


def add_parser(commands) -> None:
    new_command(
        commands,
        "env",
        "print versions, build, devices, and what is wrong with them",
        "  retinanet-ext env",
        "Print versions, build and devices, for a bug report. Exits with 1 if something is wrong.",
    )
