"""Exits with the names of the given modules that this Python lacks; `make gpu` runs on machines it did not set up."""

import importlib.util
import sys

if missing := [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]:
    sys.exit(f"missing in {sys.executable}: {', '.join(missing)}")
