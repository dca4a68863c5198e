"""Upkeep: batch runs, retraining, publishing, the README, the shipped models on trial."""
