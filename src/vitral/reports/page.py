"""Blocks as a page: one file, no request leaves it, and the same bytes for the same blocks."""

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vitral.reports.blocks import Section, Tiles

_SHADES = 9  # of a matrix


def render(
    title: str,
    lead: str,
    tiles: Tiles | None,
    sections: tuple[Section, ...],
    made_by: str,
    kind: str = "Model report",
) -> str:
    """Write the page.

    Args:
        title: what is reported on.
        lead: the verdict, in a few sentences.
        tiles: the few numbers under it.
        sections: in their order.
        made_by: the version of what wrote it.
        kind: what the page is.
    """
    style, script = _part("style.css"), _part("script.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    given: dict[str, Any] = {"title": title, "lead": lead, "tiles": tiles, "sections": sections}
    given |= {
        "style": Markup(style),
        "script": Markup(script),
        "policy": policy,
        "made_by": made_by,
        "kind": kind,
    }
    return _environment().get_template("page.html.jinja").render(**given)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("vitral.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["shade"] = shade
    return environment


def shade(share: float) -> int:
    """Give the step of a scale for a share: 0 for nothing at all, 9 for all."""
    return 0 if share <= 0 else 1 + min(int(share * _SHADES), _SHADES - 1)


@cache
def _part(name: str) -> str:
    return resources.files("vitral.reports").joinpath("templates", name).read_text(encoding="utf-8").strip()


def _hash(content: str) -> str:
    """What a content security policy knows an inline style or script by."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
