"""Upkeep: batch runs, retraining, publishing, the README, the shipped models on trial."""

import sys
from typing import Any

# Whoever reads a notebook imports jsonschema, and that builds a grammar of IRIs, of which notebooks
# have none: over a second in each process. Without this module it leaves that check out.
_modules: dict[str, Any] = sys.modules
_modules.setdefault("rfc3987_syntax", None)
