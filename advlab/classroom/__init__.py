"""Assignments made and graded, and the judge of the challenge: for who teaches with the lessons."""


class RefusedError(ValueError):
    """The submission cannot be run at all."""
