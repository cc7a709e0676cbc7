"""Every field of a settings class is a flag with its type, bounds, default and help; what the user left out stays out."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
import typer
from pydantic import Field

from flyweight.cli.flags import Fields, flag_name, given, kind, schemas_of, with_flags
from flyweight.errors import SettingsError
from flyweight.settings import (
    Accept,
    DataSettings,
    DistillSettings,
    FinetuneSettings,
    MeasureSettings,
    PruneSettings,
    QuantizeSettings,
    Settings,
)

CLASSES = (DataSettings, Accept, MeasureSettings, FinetuneSettings, DistillSettings, PruneSettings, QuantizeSettings)


class Every(Settings):
    """One field of every kind that settings use."""

    count: int = Field(3, ge=1, le=9)
    """How many [of them]."""
    share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """A share."""
    mode: Literal["fast", "slow"] = "fast"
    """How."""
    pick: Literal["all", "none-at-all"] | tuple[int, ...] = "all"
    """Which."""
    names: tuple[str, ...] = ()
    """Patterns."""
    sizes: tuple[int, ...] = (1, 32)
    """Sizes."""
    bits: int | None = Field(8, ge=1, le=8)
    """Bits, or none."""
    where: Path | None = None
    """A file."""
    cut: bool = False
    """Whether to cut."""
    whole: bool | None = None
    """Whether all of it; by default as the mode says."""


def parse(cls: type[Settings], *argv: str) -> Settings:
    """Through typer, as the command line does it."""
    seen: list[Settings] = []

    def command(settings: Settings) -> None:
        seen.append(settings)

    command.__annotations__ = {"settings": cls, "return": None}
    app = typer.Typer()
    app.command("only")(with_flags(command))
    app.callback()(lambda: None)
    made = typer.main.get_command(app)
    with made.make_context("x", ["only", *argv]) as context:
        made.invoke(context)
    return seen[0]


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--count", "4"], "count", 4),
        (["--share", "0.5"], "share", 0.5),
        (["--share", "1e-3"], "share", 0.001),
        (["--mode", "slow"], "mode", "slow"),
        (["--pick", "none-at-all"], "pick", "none-at-all"),
        (["--pick", "0,2,4"], "pick", (0, 2, 4)),
        (["--pick", "0", "--pick", "2"], "pick", (0, 2)),
        (["--names", "a*,b.*"], "names", ("a*", "b.*")),
        (["--names", "a*", "--names", "b"], "names", ("a*", "b")),
        (["--sizes", "8"], "sizes", (8,)),
        (["--bits", "none"], "bits", None),
        (["--bits", "2"], "bits", 2),
        (["--where", "x/y.csv"], "where", Path("x/y.csv")),
        (["--where", "none"], "where", Path("none")),
        (["--cut"], "cut", True),
        (["--no-cut"], "cut", False),
        (["--whole"], "whole", True),
        (["--no-whole"], "whole", False),
    ],
)
def test_each_kind_of_value(argv: list[str], field: str, value: Any) -> None:
    settings = parse(Every, *argv)
    assert getattr(settings, field) == value
    assert given(settings) == {field: value}


def test_nothing_given_is_the_default() -> None:
    settings = parse(Every)
    assert settings == Every()
    assert given(settings) == {}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--count", "many"], "--count: expected INT, got 'many'"),
        (["--count", "1.5"], "--count: expected INT, got '1.5'"),
        (["--share", "none"], "--share: expected NUMBER, got 'none'"),
        (["--mode", "fest"], "--mode: expected fast|slow, got 'fest' (did you mean 'fast'?)"),
        (["--pick", "0,x"], "--pick: expected all|none-at-all|INT,..., got '0,x'"),
        (["--bits", "nine"], "--bits: expected INT|none, got 'nine'"),
        (["--sizes", "1,,b"], "--sizes: expected INT,..., got '1,,b'"),
    ],
)
def test_no_such_value_is_wrong_usage(argv: list[str], message: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        parse(Every, *argv)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--count", "0"], "--count: input should be greater than or equal to 1, got 0"),
        (["--share", "1"], "--share: input should be less than 1, got 1"),
        (["--bits", "9"], "--bits: input should be less than or equal to 8, got 9"),
        (["--share", "nan"], "--share: input should be a finite number, got nan"),
    ],
)
def test_value_out_of_bounds_quotes_the_flag(argv: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(Every, *argv)
    assert str(caught.value) == message


def test_rule_over_several_fields() -> None:
    with pytest.raises(SettingsError, match="target heads needs an amount between 0 and 1"):
        parse(PruneSettings, "--target", "heads")


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_is_a_flag(cls: type[Settings]) -> None:
    def command(settings: Settings) -> None: ...

    command.__annotations__ = {"settings": cls, "return": None}
    made = inspect.signature(with_flags(command)).parameters
    assert set(made) == set(cls.model_fields)
    for name, parameter in made.items():
        option = get_args(parameter.annotation)[1]
        assert any(
            text.split("/")[0] == flag_name(name)
            for text in (option.default, *(option.param_decls or ()))
            if isinstance(text, str)
        )
        description = cls.model_fields[name].description
        assert description, f"{cls.__name__}.{name} has no docstring"
        assert option.help.replace(r"\[", "[").startswith(description.replace("\n", " "))


@pytest.mark.parametrize("cls", CLASSES)
def test_defaults_given_as_flags_are_the_defaults(cls: type[Settings]) -> None:
    """Writing out what the help says changes nothing: the default shown is one that can be typed."""
    argv: list[str] = []
    for name, schema in schemas_of(cls).items():
        default = schema.get("default")
        if default in (None, []):
            continue
        if isinstance(default, bool):
            argv.append(flag_name(name) if default else f"--no-{flag_name(name)[2:]}")
        else:
            argv += [flag_name(name), ",".join(map(str, default)) if isinstance(default, list) else str(default)]
    if cls is PruneSettings:  # its defaults alone leave open how much to prune
        argv += ["--amount", "0.5"]
        assert parse(cls, *argv) == PruneSettings(amount=0.5)
    else:
        assert parse(cls, *argv) == cls()


def test_bounds_and_default_stand_in_the_help() -> None:
    def command(settings: Every) -> None: ...

    command.__annotations__ = {"settings": Every, "return": None}
    texts = {n: get_args(p.annotation)[1].help for n, p in inspect.signature(with_flags(command)).parameters.items()}
    assert texts["count"] == r"How many \[of them]. (at least 1 and at most 9; default 3)"
    assert texts["share"] == "A share. (above 0 and below 1)"
    assert texts["sizes"] == "Sizes. (default 1,32)"
    assert texts["cut"] == "Whether to cut."
    assert kind(schemas_of(Every)["bits"]) == "INT|none"
    assert kind(schemas_of(Every)["where"]) == "PATH"


def test_some_fields_only() -> None:
    def command(columns: Annotated[DataSettings, Fields(("text", "label"))]) -> None: ...

    command.__annotations__ = {"columns": Annotated[DataSettings, Fields(("text", "label"))], "return": None}
    assert list(inspect.signature(with_flags(command)).parameters) == ["text", "label"]


def test_flags_of_one_command_do_not_collide() -> None:
    """Two classes on one command must not share a flag: the second would take the first one's value."""
    from flyweight.steps import STEPS

    for step in STEPS.values():
        names = [n for cls in (step.settings, DataSettings, MeasureSettings) for n in cls.model_fields]
        assert len(names) == len(set(names))
    names = [n for cls in (DataSettings, Accept, MeasureSettings) for n in cls.model_fields]
    assert len(names) == len(set(names))
