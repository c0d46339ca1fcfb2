"""Words that a command cannot take: one line that says what came, what was expected and what to do."""

from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from vitral.runtime.spelling import meant

# What the parser raises; its module is another from one version of typer to the next.
UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
ParserError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class Commands(TyperGroup):
    """A group that answers an unknown command with those that are near."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if not name.startswith("-") and name not in self.commands:
            raise UsageError(f"there is no command {name!r}{meant(name, self.commands)}", ctx)
        return super().resolve_command(ctx, args)


def line_of(error: Any) -> str:
    """Say what is wrong, and where the right words are listed; "" where the help itself was shown."""
    kind, context = type(error).__name__, getattr(error, "ctx", None)
    if kind == "NoArgsIsHelpError":
        return ""
    if kind == "NoSuchOption":
        text = _unknown_option(error.option_name, context)
    elif kind == "MissingParameter":
        text = f"{name_of(error.param, error.param_hint)} is missing"
    elif isinstance(error, typer.BadParameter):
        text = f"{name_of(error.param, error.param_hint)}: {_lowered(error.message)}"
    else:
        text = _lowered(error.format_message())
    text = " ".join(text.split()).rstrip(".")
    if context is None:
        return text
    return f"{text}{' See' if text.endswith('?') else '; see'} `{context.command_path} --help`"


def _lowered(text: str) -> str:
    return f"{text[:1].lower()}{text[1:]}"


def _unknown_option(name: str, context: Any) -> str:
    text = f"there is no option {name}"
    if context is None:
        return text
    known = [option for param in context.command.params for option in param.opts if option.startswith("--")]
    if near := meant(name, known):
        return text + near
    takes_settings = any(param.name in ("settings", "words") for param in context.command.params)
    if not takes_settings or name in _options_of_others(context):
        return text
    return f"{text}; a setting is written {name.lstrip('-').replace('-', '_')}=VALUE"


def _options_of_others(context: Any) -> set[str]:
    others = getattr(context.parent.command, "commands", {}) if context.parent else {}
    return {option for command in others.values() for param in command.params for option in param.opts}


def name_of(param: Any, hint: str | Sequence[str] | None = None) -> str:
    """``--out``, or what the help calls an argument."""
    if isinstance(hint, str):
        return hint
    if param is None:
        return "a word"
    longest: str = max(param.opts, key=len)
    return longest if longest.startswith("-") else param.metavar or longest.upper()
