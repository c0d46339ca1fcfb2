"""Which columns of a table hold the images, the labels and the rest: as told, else by their names."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vitral.data.columns import Columns
from vitral.data.split import shortened
from vitral.runtime.errors import VitralError
from vitral.runtime.spelling import meant

# Of each kind the names that are looked for, the likeliest first; case, spaces and dashes aside.
_USUAL = {
    "image": (
        "image", "image_path", "img_path", "filepath", "file_path", "path", "file_name", "filename", "file",
        "img", "image_file", "image_name", "img_name", "image_id", "id_code", "id",
    ),
    "label": (
        "label", "labels", "class", "classes", "class_name", "label_name", "category", "categories", "target",
        "targets",
    ),
    "split": ("split", "subset", "partition", "set"),
    "group": ("group", "group_id", "patient", "patient_id", "subject", "subject_id"),
}  # fmt: skip
# Rows' numbers, which pandas writes as columns without a name.
_NUMBERS = re.compile(r"(unnamed:?_\d+|__index_level_\d+__|index|)")


@dataclass(frozen=True)
class Chosen:
    """The columns of a table by what they hold."""

    image: str
    labels: tuple[str, ...]  # one, or several of 0 and 1, a class each; () where none was looked for
    split: str = ""
    group: str = ""
    note: str = ""  # on what was found by its name, where that is not plain
    told: frozenset[str] = frozenset()  # which of "image", "label", "split" and "group" the user named


def choose(
    source: str,
    names: Sequence[str],
    columns: Columns,
    all_binary: Callable[[list[str]], bool],
    *,
    labelled: bool = True,
) -> Chosen:
    """Tells which column is which.

    Args:
        source: the file, for messages.
        names: of its columns.
        columns: what the user says of them.
        all_binary: whether columns hold nothing but 0 and 1.
        labelled: whether labels are wanted; without, all but the images and the split may be missing.

    Raises:
        VitralError: if a column that the user names is not there, or none can be told to hold the images, or
            the labels, or a name that is wanted stands there twice.
    """
    told = {kind: getattr(columns, kind) for kind in _USUAL if getattr(columns, kind)}
    if columns.recorded:  # of another table, perhaps
        told = {kind: name for kind, name in told.items() if set(_listed(name, names)) <= {*names}}
    if not labelled:
        told.pop("label", None)
    found = {kind: _listed(told[kind], names) if kind in told else _usual(kind, names) for kind in _USUAL}
    for kind in told:
        _refuse_missing(source, columns.say(kind), found[kind], names)
        if kind != "label":
            _refuse_several(columns.say(kind), found[kind])
    if labelled and not found["label"]:
        found["label"] = _remaining(names, found, all_binary)
    missing = [kind for kind in (("image", "label") if labelled else ("image",)) if not found[kind]]
    if missing:
        raise VitralError(
            f"{source} has no column {' and '.join(missing)}; it has {shortened(names)}; "
            f"say which with {columns.say(*missing)}"
        )
    if not labelled:
        found["label"] = []
    for name in (name for of_kind in found.values() for name in of_kind):
        if list(names).count(name) > 1:
            raise VitralError(f"{source} has {names.count(name)} columns {name!r}; which one is meant?")
    [image], labels, [split], [group] = (found[kind] or [""] * (kind != "label") for kind in _USUAL)
    chosen = Chosen(image, tuple(labels), split, group, told=frozenset(told))
    return Chosen(image, tuple(labels), split, group, _note(source, chosen, columns), chosen.told)


def _plain(name: str) -> str:
    return re.sub(r"[\s\-]+", "_", name.strip().lower())


def _listed(name: str, names: Sequence[str]) -> list[str]:
    """The columns that a user's word names: one, or several with commas between."""
    if name in names:
        return [name]
    return [part.strip() for part in name.split(",") if part.strip()]


def _usual(kind: str, names: Sequence[str]) -> list[str]:
    plain = {_plain(name): name for name in reversed(names)}
    return next(([plain[name]] for name in _USUAL[kind] if name in plain), [])


def _refuse_missing(source: str, said: str, wanted: list[str], names: Sequence[str]) -> None:
    for name in wanted:
        if name not in names:
            raise VitralError(
                f"{source} has no column {name!r} ({said}); it has {shortened(names)}{meant(name, names)}"
            )


def _refuse_several(said: str, wanted: list[str]) -> None:
    if len(wanted) > 1:
        raise VitralError(f"{said} names {len(wanted)} columns, {', '.join(wanted)}; name one")


def _remaining(
    names: Sequence[str], found: dict[str, list[str]], all_binary: Callable[[list[str]], bool]
) -> list[str]:
    """The columns left when the others are taken: the only one, or several of 0 and 1."""
    taken = {name for of_kind in found.values() for name in of_kind}
    rest = [
        name
        for name in names
        if name not in taken and not _NUMBERS.fullmatch(_plain(name)) and _plain(name) not in _USUAL["image"]
    ]
    if not found["image"] or len(rest) != len(set(rest)):
        return []
    return rest if len(rest) == 1 or (len(rest) > 1 and all_binary(rest)) else []


def _note(source: str, chosen: Chosen, columns: Columns) -> str:
    """Says what was found by its name; nothing of what is called as it is here."""
    found = {
        "image": (chosen.image, ("image",)),
        "label": (", ".join(chosen.labels), ("label", "labels", "")),
        "split": (chosen.split, ("split", "")),
        "group": (chosen.group, ("",)),
    }
    odd = any(name not in plain for kind, (name, plain) in found.items() if kind not in chosen.told)
    if not odd:
        return ""
    words = [
        f"{kind} {shortened(list(chosen.labels)) if kind == 'label' else name}"
        for kind, (name, _) in found.items()
        if name
    ]
    advice = f"if one is wrong, name it, such as {columns.say('label' if chosen.labels else 'image')}NAME"
    return f"columns of {source}: {', '.join(words)}; {advice}"
