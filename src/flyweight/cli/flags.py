"""Flags made from the settings classes, so that a setting is written in one place only.

A command's parameter annotated with a settings class becomes one flag for each of its fields: the name with dashes,
the type, bounds and default of the field, its docstring as help. The command is called with an instance; which fields
the user gave stands in `model_fields_set`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, get_args, get_origin

import typer
from pydantic import ValidationError

from flyweight.errors import SettingsError, nearest
from flyweight.settings import Settings, TrainSettings

__all__ = ["Fields", "flag_name", "given", "with_flags"]

# Errors of pydantic that mean "right kind of value, but not an allowed one"; all others mean wrong usage.
BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "value_error", "finite_number"}
PANELS = {"DataSettings": "Data", "Accept": "Acceptance", "MeasureSettings": "Measuring", "TrainSettings": "Training"}
LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
PRIMITIVES = {"integer": "INT", "number": "NUMBER", "string": "TEXT"}

Schema = Mapping[str, Any]


class Fields(NamedTuple):
    """`Annotated[DataSettings, Fields("text", "label")]`: flags for these fields only."""

    names: tuple[str, ...]


class Group(NamedTuple):
    """One settings class of a command. parameter: where the command wants the instance."""

    parameter: str
    cls: type[Settings]
    names: tuple[str, ...]


@functools.cache
def schemas_of(cls: type[Settings]) -> Mapping[str, Schema]:
    """JSON schema of every field: type, choices, bounds, default and description in one flat form."""
    properties: Mapping[str, Schema] = cls.model_json_schema()["properties"]
    return properties


def flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def given(settings: Settings) -> dict[str, Any]:
    """The fields that the user set."""
    return {name: getattr(settings, name) for name in type(settings).model_fields if name in settings.model_fields_set}


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its settings parameters spread out into flags, as typer wants to see it."""
    parameters: list[inspect.Parameter] = []
    groups: list[Group] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = _group(parameter)
        if group is None:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        else:
            groups.append(group)
            parameters.extend(_parameter(group.cls, name) for name in group.names)

    @functools.wraps(command)
    def spread(**values: Any) -> None:
        for group in groups:
            mine = {name: values.pop(name) for name in group.names}
            values[group.parameter] = read_flags(group.cls, {k: v for k, v in mine.items() if v not in (None, [])})
        command(**values)

    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spread


def read_flags(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Flag texts -> settings. Raises BadParameter for what is no such value, SettingsError for one not allowed."""
    schemas = schemas_of(cls)
    try:
        return cls(**{name: _plain(schemas[name], value) for name, value in values.items()})
    except ValidationError as error:
        wrong = min(error.errors(), key=lambda e: e["type"] not in BOUNDS)
    text = wrong["msg"].removeprefix("Value error, ")
    if not wrong["loc"]:
        raise SettingsError(text)
    name = str(wrong["loc"][0])
    schema, got = schemas[name], values[name]
    got = ",".join(got) if isinstance(got, list) else got
    if wrong["type"] in BOUNDS:
        raise SettingsError(f"{flag_name(name)}: {text[0].lower()}{text[1:]}, got {got}")
    close = nearest(str(got), [choice for option in _options(schema) for choice in option.get("enum", ())])
    raise typer.BadParameter(f"{flag_name(name)}: expected {kind(schema)}, got '{got}'{close}")


def kind(schema: Schema) -> str:
    """What a value looks like: `INT`, `linear|cosine`, `all|every-other|INT,...`, `INT|none`."""
    words = []
    for option in _options(schema):
        if "enum" in option or "const" in option:
            words += [str(value) for value in option.get("enum", [option.get("const")])]
        elif option.get("type") == "array":
            fixed = option.get("prefixItems")
            words.append(",".join(map(kind, fixed)) if fixed else f"{kind(option['items'])},...")
        elif option.get("type") == "string" and option.get("format") == "path":
            words.append("PATH")
        elif option.get("type") != "null":
            words.append(PRIMITIVES[option["type"]])
    return "|".join([*words, "none"] if _takes_none(schema) else words)


def _options(schema: Schema) -> Sequence[Schema]:
    options: Sequence[Schema] = schema.get("anyOf", [schema])
    return options


def _takes_none(schema: Schema) -> bool:
    """Where None is not the default anyway, `none` says it."""
    return schema.get("default") is not None and any(option.get("type") == "null" for option in _options(schema))


def _plain(schema: Schema, value: Any) -> Any:
    if isinstance(value, bool):
        return value
    arrays = any(option.get("type") == "array" for option in _options(schema))
    words = value if isinstance(value, list) else [value]
    if len(words) == 1 and words[0] == "none" and _takes_none(schema):
        return None
    if not arrays or (len(words) == 1 and any(words[0] in option.get("enum", ()) for option in _options(schema))):
        return words[-1]
    return [part.strip() for word in words for part in word.split(",") if part.strip()]


def _group(parameter: inspect.Parameter) -> Group | None:
    annotation = parameter.annotation
    cls, *extra = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    if not (isinstance(cls, type) and issubclass(cls, Settings)):
        return None
    chosen = [item.names for item in extra if isinstance(item, Fields)]
    # A step's own fields before those of the training, as the help shows them.
    ordered = sorted(cls.model_fields, key=lambda name: _panel(cls, name) == PANELS["TrainSettings"])
    return Group(parameter.name, cls, chosen[0] if chosen else tuple(ordered))


def _parameter(cls: type[Settings], name: str) -> inspect.Parameter:
    schema = schemas_of(cls)[name]
    flag = flag_name(name)
    boolean = any(option.get("type") == "boolean" for option in _options(schema))  # or none, where it is not given
    arrays = any(option.get("type") == "array" for option in _options(schema))
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if boolean else flag,
        help=_help(schema).replace("[", r"\["),  # rich would take [x] for a style
        metavar="" if boolean else kind(schema),
        show_default=False,  # typer knows none: what the user left out has to stay out
        rich_help_panel=_panel(cls, name),
    )
    annotation: Any = bool | None if boolean else list[str] | None if arrays else str | None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
    )


def _help(schema: Schema) -> str:
    text = schema.get("description", "").replace("\n", " ")
    limits = [f"{word} {o[key]:g}" for o in _options(schema) for key, word in LIMITS.items() if key in o]
    facts = [" and ".join(limits)] if limits else []
    if (default := schema.get("default")) not in (None, "", []) and not isinstance(default, bool):
        facts.append("default " + (",".join(map(str, default)) if isinstance(default, list) else f"{default}"))
    return f"{text} ({'; '.join(facts)})" if facts else text


def _panel(cls: type[Settings], name: str) -> str:
    if issubclass(cls, TrainSettings) and name in TrainSettings.model_fields:
        return PANELS["TrainSettings"]
    return PANELS.get(cls.__name__, "Settings of the step")
