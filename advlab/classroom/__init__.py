"""Assignments made and graded, and the judge of the challenge: for who teaches with the lessons."""

import sys
from typing import Any

# As in `advlab.upkeep`, which the sandbox of a submission does not have.
_modules: dict[str, Any] = sys.modules
_modules.setdefault("rfc3987_syntax", None)


class RefusedError(ValueError):
    """The submission cannot be run at all."""
