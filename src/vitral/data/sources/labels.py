"""The label columns of tables: which classes there are, and which of them each row shows."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitral.data.split import shortened
from vitral.runtime.errors import VitralError

# Of a split without labels, by the convention of the Hugging Face hub.
_NO_LABEL = -1


def _row(row: int) -> str:
    return f"row {row}"


@dataclass(frozen=True)
class LabelColumn:
    """The labels of one split."""

    split: str
    values: Any  # an Arrow column of single labels, or of lists of them
    names: tuple[str, ...] | None  # what the labels 0, 1, 2, ... are called, where something says so
    where: Callable[[int], str] = _row  # which row of which file one of them is, for messages

    @property
    def has_lists(self) -> bool:
        import pyarrow.types as types

        kind = self.values.type
        return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)

    @property
    def elements(self) -> Any:
        """All labels as one column; of lists, what they hold."""
        import pyarrow as pa

        if not self.has_lists:
            return self.values
        return pa.chunked_array(
            [chunk.flatten() for chunk in self.values.chunks], self.values.type.value_type
        )

    @property
    def lengths(self) -> np.ndarray:
        """How many labels each row's list has, (n,); 0 where there is no list."""
        import pyarrow.compute

        pc: Any = pyarrow.compute
        return pc.fill_null(pc.list_value_length(self.values), 0).to_numpy().astype(np.int64)

    def distinct(self) -> set:
        return set(self.elements.unique().to_pylist())

    def codes(self) -> tuple[np.ndarray, list]:
        """Each label's place in a list of those that there are, and that list."""
        import pyarrow as pa

        elements = self.elements
        if pa.types.is_dictionary(elements.type):
            elements = elements.cast(elements.type.value_type)
        encoded = elements.combine_chunks().dictionary_encode()
        if isinstance(encoded, pa.ChunkedArray):  # older versions of Arrow
            encoded = encoded.combine_chunks()
        return encoded.indices.to_numpy(zero_copy_only=False), encoded.dictionary.to_pylist()


def read_labels(
    source: str, columns: Mapping[str, LabelColumn]
) -> tuple[tuple[str, ...], dict[str, np.ndarray], list[str]]:
    """The classes, each split's labels as a `Split` has them, and notes on splits that are left out.

    Lists are of the classes that an image shows; vectors of 0 and 1, all of one length, say it of each class.

    Args:
        source: for messages.
        columns: of each split.

    Raises:
        VitralError: if the labels are of no kind that classes can be made of.
    """
    columns = dict(columns)
    left_out = [name for name, column in columns.items() if name != "train" and _is_unlabelled(column)]
    notes = [
        f"left out {name}: its {len(columns.pop(name).values):,} rows have no labels" for name in left_out
    ]
    _refuse_mixed(source, columns)
    for column in columns.values():
        _check_kind(column)
    names = columns["train"].names
    if (length := _vector_length(list(columns.values()))) is not None:
        if names and len(names) != length:
            raise VitralError(f"the labels are vectors of {length}, and {len(names)} classes are named")
        classes = names or tuple(map(str, range(length)))
        return classes, {name: _of_vectors(column, length) for name, column in columns.items()}, notes
    index = _index(columns, names)
    classes = names or tuple(map(str, index))
    return classes, {name: _of_values(column, index, len(classes)) for name, column in columns.items()}, notes


def _is_unlabelled(column: LabelColumn) -> bool:
    """Whether every row says that it has no label."""
    return len(column.values) > 0 and not column.has_lists and column.distinct() <= {_NO_LABEL, None}


def _refuse_mixed(source: str, columns: dict[str, LabelColumn]) -> None:
    if len({column.has_lists for column in columns.values()}) > 1:
        raise VitralError(f"{source}: the labels are lists in some of {', '.join(columns)} and not in others")
    names = columns["train"].names
    for split, column in columns.items():
        if column.names not in (names, None):
            raise VitralError(f"the train and {split} files name or number their classes differently")
    kinds = {_is_text(column) for column in columns.values() if len(column.elements)}
    if len(kinds) > 1 and not names:
        raise VitralError(
            f"{source}: the labels are text in some of {', '.join(columns)} and numbers in others"
        )


def _element_type(column: LabelColumn) -> Any:
    import pyarrow.types as types

    kind = column.elements.type
    return kind.value_type if types.is_dictionary(kind) else kind


def _is_text(column: LabelColumn) -> bool:
    import pyarrow.types as types

    kind = _element_type(column)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _check_kind(column: LabelColumn) -> None:
    """Raises VitralError unless the labels are whole numbers, text, or true and false."""
    import pyarrow.types as types

    kind = _element_type(column)
    if types.is_floating(kind):
        # Of lists of fractions, `_vector_length` judges.
        found = set() if column.has_lists else column.distinct() - {None}
        odd = [value for value in found if value != value or abs(value) == float("inf") or value % 1]
        if odd:
            raise VitralError(
                f"{column.split!r} has labels that are not whole numbers, such as {odd[0]}; give the "
                "number or the name of a class"
            )
    elif not (_is_text(column) or types.is_integer(kind) or types.is_boolean(kind) or types.is_null(kind)):
        raise VitralError(
            f"the labels are {column.values.type}; they must be numbers, text, or lists of those"
        )


# --- One class per image, or lists of classes -------------------------------------------------------


def _index(columns: dict[str, LabelColumn], names: tuple[str, ...] | None) -> dict[Any, int]:
    """Which class each value of the label column stands for, the classes in order."""
    if names:
        return {value: i for i, name in enumerate(names) for value in (i, name)}
    values = {value for column in columns.values() for value in column.distinct()}
    if None in values:
        column = next(column for column in columns.values() if column.elements.null_count)
        first = int(np.flatnonzero(column.elements.is_null().to_numpy())[0])
        if column.has_lists:
            first = int(np.searchsorted(np.cumsum(column.lengths), first, side="right"))
        raise VitralError(
            f"the label column has empty cells; each image needs a label, and {column.where(first)} has none"
        )
    return {value: i for i, value in enumerate(sorted(values))}


def _of_values(column: LabelColumn, index: dict[Any, int], num_classes: int) -> np.ndarray:
    codes, values = column.codes()
    unknown = column.distinct() - set(index)
    if unknown:
        listed = shortened(sorted(map(str, unknown)))
        raise VitralError(f"{column.split!r} has labels that the classes lack: {listed}")
    places = np.array([index[value] for value in values], dtype=np.int64)
    if not column.has_lists:
        return places[codes] if len(codes) else np.empty(0, np.int64)
    if column.values.null_count:
        row = int(np.flatnonzero(column.values.is_null().to_numpy())[0])
        raise VitralError(
            f"{column.split} {column.where(row)} has no list of labels; an image without "
            "classes has an empty one"
        )
    labels = np.zeros((len(column.values), num_classes), dtype=bool)
    if len(codes):
        labels[np.repeat(np.arange(len(labels)), column.lengths), places[codes]] = True
    return labels


# --- Vectors of 0 and 1 ----------------------------------------------------------------------------


def _vector_length(columns: list[LabelColumn]) -> int | None:
    """The common length of lists that are vectors of 0 and 1; None if they are lists of classes.

    Raises:
        VitralError: if they are neither.
    """
    import pyarrow.types as types

    if not columns[0].has_lists:
        return None
    nulls = sum(column.values.null_count for column in columns)
    lengths = set().union(*({*column.lengths.tolist()} for column in columns)) | ({None} if nulls else set())
    ones = set().union(*(column.distinct() for column in columns)) <= {0, 1}
    numbers = any(types.is_floating(_element_type(c)) or types.is_boolean(_element_type(c)) for c in columns)
    if ones and len(lengths) == 1 and (numbers or _says_a_class_twice(columns)):
        return lengths.pop()
    if numbers:
        raise VitralError(
            "the labels are lists of fractions or of true and false; give the classes that an image shows, "
            "or a vector of 0 and 1 for all of them, of one length"
        )
    return None


def _says_a_class_twice(columns: list[LabelColumn]) -> bool:
    """A list of classes names each once; a vector of more than two has a number twice."""
    for column in columns:
        codes, values = column.codes()
        rows = np.repeat(np.arange(len(column.values)), column.lengths)
        if len(np.unique(rows * max(len(values), 1) + codes)) < len(codes):
            return True
    return False


def _of_vectors(column: LabelColumn, length: int) -> np.ndarray:
    return column.elements.to_numpy().astype(np.float64).reshape(-1, length) > 0


# --- The names that metadata gives -----------------------------------------------------------------


def class_names(metadata: Mapping[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    """What the Hugging Face metadata of a file calls the labels 0, 1, 2, ... of a column.

    Raises:
        VitralError: if the metadata is none that it could mean.
    """
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return None
    try:
        info = json.loads(text)
        features = info.get("info", {}).get("features") or {}
        feature = features.get(column) or {}
        # Sequence(ClassLabel), List(ClassLabel) of newer versions of datasets, or [ClassLabel].
        inner = feature[0] if isinstance(feature, list) and feature else feature
        inner = inner.get("feature") or inner
        names = inner.get("names")
    # Whatever stands in the place of an object.
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise VitralError(f"the Hugging Face metadata of the file cannot be read: {error}") from error
    if names is None:
        return None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise VitralError(
            "the Hugging Face metadata of the file names its classes by what is no list of names"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise VitralError(f"the Hugging Face metadata of the file names two classes {twice!r}")
    return tuple(names)
