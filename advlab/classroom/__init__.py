"""Assignments made and graded, and the judge of the challenge: for who teaches with the lessons."""
