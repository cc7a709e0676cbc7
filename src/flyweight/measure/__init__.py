"""Figures about a model, each with its unit, its spread and how it was taken. Only `flops` and parts of `size` need torch."""
