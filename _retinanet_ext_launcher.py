"""Where the command `retinanet-ext` starts: outside the package, so that `retinanet-ext env` can also report on a
package that does not import."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def load_diagnostics():
    """retinanet_ext/diagnostics.py by its path, without importing the package."""
    package = importlib.util.find_spec("retinanet_ext")
    if package is None or not package.submodule_search_locations:
        sys.exit("retinanet-ext: the package retinanet_ext is not installed in this environment")
    path = Path(next(iter(package.submodule_search_locations))) / "diagnostics.py"
    spec = importlib.util.spec_from_file_location("retinanet_ext_diagnostics", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    try:
        from retinanet_ext.cli import main as command
    except Exception as error:  # whatever is wrong with the package or with torch, `env` reports it
        if sys.argv[1:2] == ["env"]:
            return load_diagnostics().print_report()
        print(f"retinanet-ext: {error}\nRun `retinanet-ext env` for details.", file=sys.stderr)
        return 1
    return command()


if __name__ == "__main__":
    sys.exit(main())
