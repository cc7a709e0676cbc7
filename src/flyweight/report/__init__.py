"""Measurements as people read them: terminal table, model card, one-file HTML. Reads the manifest alone: no row of data."""
