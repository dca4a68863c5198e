"""advlab: the bench that the lessons stand on.

An image passes through the modules in this order, and each imports only from those before it:
data -> models -> attacks -> training -> checkpoints -> evaluation -> paper -> plots.
"""

__version__ = "0.1.0"
