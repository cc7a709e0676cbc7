"""What all settings share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flyweight.errors import SettingsError, nearest

__all__ = ["Positive", "Settings", "Share"]

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Frozen, validated, closed: unknown keys are refused and the nearest known one is suggested."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> Self:
        """Validate `values`; `where` is the YAML path or the command that they came from.

        Raises SettingsError naming the first wrong key as `where.key`.
        """
        for key in values:
            if key not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                raise SettingsError(
                    f"one of the keys of {where}", f"'{key}'{nearest(str(key), cls.model_fields)}", f"known: {known}"
                )
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in (where, *first["loc"]))
            text = first["msg"].removeprefix("Value error, ")
            given = first["input"]
            got = "" if isinstance(given, Mapping | BaseModel) else f", got {given!r}"
            raise SettingsError(f"{place}: {text[0].lower()}{text[1:]}{got}") from None
