"""The generated parts of the pages are what the code says now."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs import generate

MARKDOWN = [
    Path("README.md"),
    Path("CONTRIBUTING.md"),
    *sorted(p.relative_to(generate.ROOT) for p in generate.ROOT.glob("docs/**/*.md")),
]


@pytest.mark.parametrize("page", generate.PAGES)
def test_page_is_fresh(page: str) -> None:
    assert (generate.ROOT / page).read_text("utf-8") == generate.render(page), "run: make docs"


def test_every_generated_part_is_known() -> None:
    for path in MARKDOWN:
        marked = set(generate.PART.findall((generate.ROOT / path).read_text("utf-8")))
        names = {found[1] for found in marked}
        assert names <= set(generate.PARTS)
        assert not names or path.as_posix() in generate.PAGES


def test_a_change_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from flyweight.settings import QuantizeSettings

    monkeypatch.setattr(QuantizeSettings.model_fields["bits"], "description", "Bits in another word.")
    assert "Bits in another word." in generate.render("docs/reference/settings.md")


def test_every_command_and_setting_is_told() -> None:
    from flyweight import settings
    from flyweight.cli import app

    page, keys = generate.cli(), generate.settings()
    names = [command.name for command in app.registered_commands]
    assert names
    assert all(f"## `flyweight {name}`" in page for name in names)
    for cls in vars(settings).values():
        if (
            isinstance(cls, type)
            and issubclass(cls, settings.Settings)
            and cls not in (settings.Settings, settings.TrainSettings)
        ):
            assert all(f"`{key}`" in keys for key in cls.model_fields)


@pytest.mark.parametrize("path", MARKDOWN, ids=str)
def test_links_lead_somewhere(path: Path) -> None:
    import re

    text = (generate.ROOT / path).read_text("utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (generate.ROOT / path).parent.joinpath(target).resolve().exists(), f"{path} links to {target}"
