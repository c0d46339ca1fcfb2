"""Puts the page together from its sources: one HTML file that asks nothing of anybody but its own server.

The scripts are plain files, one after another in the order of `_SCRIPTS`; the page's policy knows each by its
hash, so that a browser runs these and no others.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from vitral.runtime.version import vitral_version

_SCRIPTS = (
    "elements.js", "bytes.js", "deep_png.js",
    "picture.js", "preprocess.js", "attention.js", "glass.js", "looking.js",
    "comparison.js", "answers.js", "intake.js", "page.js",
)  # fmt: skip


def script(engine: str) -> str:
    """The page's own script with one of its engines, `engine_wasm.js` or `engine_server.js`.

    It is one function, so that its names are no names of the page's.
    """
    start = {"engine_wasm.js": "new WasmEngine(about)", "engine_server.js": "new ServerEngine(about)"}[engine]
    parts = [source(name) for name in (*_SCRIPTS, engine)]
    return '(() => {\n"use strict";\n' + "\n".join(parts) + f"\nstartPage((about) => {start});\n}})();"


def render(
    title: str,
    words: Mapping[str, str],
    about: Mapping[str, Any],
    golden_picture: bytes,
    scripts: Sequence[str],
    blocks: Mapping[str, str] | None = None,
    policy: str = "",
) -> bytes:
    """Writes the page.

    Args:
        title: what it is called before its model is known.
        words: the sentences that differ between the engines: `invitation` and `promise`.
        about: what the script is told, as JSON.
        golden_picture: a PNG, the example that every page has.
        scripts: what runs, in order; none may end its own element.
        blocks: data within the page, base64 by name.
        policy: a content security policy for the page to carry; "": the server sends it.
    """
    from markupsafe import Markup

    if any("</script" in text.lower() for text in scripts):
        raise ValueError("a script of the page would end its own element")
    data = json.dumps(about, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    given: dict[str, Any] = {**words, "title": title, "policy": policy, "version": vitral_version()}
    given |= {"about": Markup(data), "golden_picture": encoded(golden_picture), "blocks": blocks or {}}
    given |= {"style": Markup(source("page.css")), "scripts": [Markup(text) for text in scripts]}
    return _template().render(**given).encode()


def policy(scripts: Sequence[str], more: str, scripts_may: str = "") -> str:
    """A content security policy that lets these scripts and the page's style run, and nothing else.

    Args:
        scripts: the page's, byte for byte.
        more: directives beyond those that every page has.
        scripts_may: what scripts are allowed besides, such as 'wasm-unsafe-eval'.
    """
    hashes = " ".join(_hash(text) for text in scripts)
    run = f"{hashes} {scripts_may}".strip()
    return (
        f"default-src 'none'; script-src {run}; style-src {_hash(source('page.css'))}; img-src blob: data:; "
        f"{more}base-uri 'none'; form-action 'none'"
    )


def encoded(content: bytes) -> str:
    """base64 text."""
    return base64.b64encode(content).decode()


@cache
def source(name: str) -> str:
    """A file of the page's sources."""
    return resources.files("vitral.ship.page").joinpath("sources", name).read_text("utf-8").strip()


def _hash(content: str) -> str:
    """What a content security policy knows an inline style or script by."""
    return f"'sha256-{encoded(hashlib.sha256(content.encode()).digest())}'"


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vitral.ship.page", "sources"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.jinja")
