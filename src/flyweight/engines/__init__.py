"""Engines export a finished model and run it; they never change what it computes."""
