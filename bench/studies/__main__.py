"""Run every study, one after the other: `python -m bench.studies [--quick] [--out FOLDER]`."""

import importlib
import sys

from bench.studies import STUDIES, common

if __name__ == "__main__":
    for name in STUDIES:
        common.main(importlib.import_module(f"bench.studies.{name}"))
    sys.exit(0)
