"""What a step does, as one phrase."""

from __future__ import annotations

from flyweight.settings import DistillSettings, FinetuneSettings, PruneSettings, QuantizeSettings

__all__ = ["describe"]

GRADUAL = {"one-shot": "", "cubic": ", gradually", "l0": ""}


def describe(settings: object) -> str:
    """The settings that say most about a step."""
    if isinstance(settings, PruneSettings):
        return _pruning(settings)
    if isinstance(settings, DistillSettings):
        layers = (
            settings.layers if isinstance(settings.layers, str) else "layers " + ", ".join(map(str, settings.layers))
        )
        width = f", width {settings.width}" if settings.width else ""
        return f"{layers}{width}, {settings.epochs:g} epochs, teacher {' + '.join(settings.teachers)}" + (
            ", with control" if settings.control else ""
        )
    if isinstance(settings, FinetuneSettings):
        return f"{settings.epochs:g} epochs at {settings.learning_rate:g}"
    assert isinstance(settings, QuantizeSettings)
    bits = f"{settings.bits} bits"
    if settings.bits_per_weight is not None:
        bits = f"{settings.bits_per_weight:g} bits on average"
    if settings.max_megabytes is not None:
        bits = f"bits for {settings.max_megabytes:g} MB in all"
    texts = f", {settings.samples} texts" if settings.calibrated else ""
    return f"{bits} {settings.scheme} by {settings.method}, activations {settings.activations}{texts}"


def _pruning(settings: PruneSettings) -> str:
    if settings.speedup is not None:
        much = f"{settings.target} for {settings.speedup:g}x less {settings.cost}"
    else:
        much = f"{f'{settings.amount:.0%} of ' if settings.amount else ''}{settings.target}"
    if settings.pattern != "unstructured":
        much += f" {settings.pattern}"
    how = "gates that are learned" if settings.gradual == "l0" else settings.criterion
    restored = f", {settings.restore} restored" if settings.restore != "none" else ""
    texts = f", {settings.samples} texts" if settings.calibrated else ""
    return f"{much} by {how}{GRADUAL[settings.gradual]}{restored}{texts}"
