"""The documentation; `python -m docs.generate` writes what comes from the code."""
