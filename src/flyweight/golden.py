"""Neutral sentences of our own: they stand in for the user's texts where none may be used or none were given."""

from __future__ import annotations

__all__ = ["TEXTS"]

TEXTS = (
    "The train to the coast leaves at seven in the morning.",
    "Yes.",
    "She said the soup was too salty, but she finished it anyway.",
    "What a wonderful surprise!",
    "The committee postponed its decision until the figures for the last quarter were available.",
    "It rained for three days, and then the river rose.",
    "Please send the parcel back to the address on the label.",
    "He has never been so bored by a speech in his life.",
    "Water boils at a lower temperature on a high mountain.",
    "My brother's bicycle was stolen from the yard last night, and nobody saw anything.",
    "No, thank you; I would rather walk.",
    "The new edition corrects several mistakes of the old one and adds a chapter on gardens.",
    "Can you tell me where the library is?",
    "Although the actors did their best, the play felt longer than it was, and half of the seats were empty after the pause.",
    "Two plus two is four.",
    "In 1906 the village had a school, a mill, two inns and a blacksmith who also pulled teeth.",
)
