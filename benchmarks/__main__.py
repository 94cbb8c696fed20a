"""`make bench`: every figure of the documentation, each from its own table.

python -m benchmarks              all of them
python -m benchmarks core memory  some
"""

import importlib
import sys

NAMES = ("core", "memory", "allocation")

if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        importlib.import_module(f"benchmarks.{name}").main()
