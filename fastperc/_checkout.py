"""What ``import fastperc`` finds in a checkout that is not built: the installed package, or an error in one line.

Python looks in the current folder first, and so finds the source in a clone's root before the installed package.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import module_from_spec, spec_from_file_location

PACKAGE = "fastperc"
BUILD_FILE = "CMakeLists.txt"  # stands beside the package in a checkout


def use_installed() -> None:
    """Loads the package that is installed elsewhere in the place of this one, if this is an unbuilt checkout.

    Raises:
        ImportError: this is an unbuilt checkout, and no other package is found.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    checkout = os.path.dirname(here)
    if is_built(here) or not os.path.exists(os.path.join(checkout, BUILD_FILE)) or installed_in_place(checkout):
        return
    for entry in map(os.path.abspath, sys.path):
        folder = os.path.join(entry, PACKAGE)
        path = os.path.join(folder, "__init__.py")
        if not os.path.exists(path) or os.path.realpath(folder) == os.path.realpath(here):
            continue
        if is_built(folder) or not os.path.exists(os.path.join(entry, BUILD_FILE)):
            spec = spec_from_file_location(PACKAGE, path, submodule_search_locations=[folder])
            assert spec is not None and spec.loader is not None
            sys.modules[PACKAGE] = module_from_spec(spec)  # which the import statement then gives
            del sys.modules[__name__]
            spec.loader.exec_module(sys.modules[PACKAGE])
            return
    raise ImportError(f"{checkout} is a checkout of fastperc that is not built: run `pip install -e .` there")


def is_built(folder: str) -> bool:
    """Whether the package in ``folder`` has the compiled module for this Python."""
    return any(os.path.exists(os.path.join(folder, f"_C{suffix}")) for suffix in EXTENSION_SUFFIXES)


def installed_in_place(checkout: str) -> bool:
    """Whether ``pip install -e`` has installed ``checkout``; without a compiler that builds nothing."""
    import json
    from importlib.metadata import distributions
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    for distribution in distributions(name=PACKAGE):
        source = json.loads(distribution.read_text("direct_url.json") or "{}")
        folder = url2pathname(urlsplit(source.get("url", "")).path)
        if source.get("dir_info", {}).get("editable") and os.path.realpath(folder) == os.path.realpath(checkout):
            return True
    return False
