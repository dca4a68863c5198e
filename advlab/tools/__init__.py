"""What runs from the command line and no lesson imports."""
