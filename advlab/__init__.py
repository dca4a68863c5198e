"""advlab: the bench that the lessons stand on.

An image passes through the modules in this order, and each imports only from those before it:
data -> datasets -> models -> forward -> attacks -> recipes -> training -> checkpoints -> store ->
evaluation -> autoattack -> audit -> plots. `catalogue` says what there is, `lab` reads a lesson's
settings. The rooms (`classroom`, `bench`, `upkeep`) are what the command `advlab` runs.
"""

__version__ = "0.1.0"
