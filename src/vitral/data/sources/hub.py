"""Datasets on the Hugging Face hub: ``hf://datasets/org/name[@revision][:config]``.

By ``hf://`` the files of a revision are downloaded into huggingface_hub's cache and read there. By
``hf-stream://`` only footers and labels are, and images are fetched by row groups when they are wanted, of
which a bounded part is kept (`fetched`). Both give the same images in the same order.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from vitral.data.columns import FOUND, Columns
from vitral.data.sources.fetched import FetchedFiles
from vitral.data.sources.parquet import ParquetFile, Store
from vitral.data.sources.roles import role
from vitral.data.sources.rows import TableFile, read_files
from vitral.data.split import Found, shortened
from vitral.runtime.errors import VitralError
from vitral.runtime.extras import need
from vitral.runtime.files import cache_folder, write_atomically
from vitral.runtime.hub import asked, explained

_REFERENCE = re.compile(
    r"(?P<way>hf|hf-stream)://datasets/(?P<repository>[^/@:]+/[^/@:]+)(@(?P<revision>[^:]+))?(:(?P<config>.+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Where the hub keeps what it makes of datasets that are stored otherwise.
_CONVERTED = "refs/convert/parquet"
_SECONDS = 20.0  # to wait for the hub's first response


def is_hub(source: str) -> bool:
    """Tells whether DATA is on the hub."""
    return source.startswith(("hf://", "hf-stream://"))


@dataclass(frozen=True)
class Reference:
    """A dataset on the hub."""

    source: str
    repository: str
    revision: str | None
    config: str
    streamed: bool

    @classmethod
    def parse(cls, source: str) -> "Reference":
        """Raises VitralError if it is no ``hf://datasets/org/name[@revision][:config]``."""
        found = _REFERENCE.fullmatch(source)
        if not found:
            raise VitralError(
                f"{source} does not name a dataset on the hub; write hf://datasets/org/name, "
                "hf://datasets/org/name@revision or hf://datasets/org/name:config, or hf-stream:// for hf:// "
                "to download no more than is read"
            )
        return cls(
            source, found["repository"], found["revision"], found["config"] or "", found["way"] == "hf-stream"
        )


@dataclass(frozen=True)
class Listing:
    """What a revision of a dataset holds."""

    commit: str
    sizes: dict[str, int]  # of its files, by path
    card: dict[str, Any]  # what its README says for programs


def read_hub(source: str, columns: Columns = FOUND) -> Found:
    """Gives the classes and splits of a dataset.

    Args:
        source: as the command line's DATA.
        columns: as of any table.

    Raises:
        VitralError: if there is no such dataset, it is gated, holds no parquet files, or the hub cannot be
            reached.
    """
    return read_files(source, *files_on_hub(source), columns)


def files_on_hub(source: str) -> tuple[dict[str, list[str]], Callable[[str], TableFile]]:
    """Gives the files of each split of a dataset, and what opens one."""
    need("a dataset on the hub", "pyarrow", extra="data")
    reference = Reference.parse(source)
    with explained(source):
        listing, files = _listed(reference)
        card = _names_of_classes(listing.card, reference.config)
        if reference.streamed:
            store: Store | None = _Remote(reference.repository, listing.commit, listing.sizes)
        else:
            store = None
            files = {split: _downloaded(reference, listing, paths) for split, paths in files.items()}
    return files, functools.partial(_HubFile, store=store, card=card)


class _HubFile(ParquetFile):
    """A file whose classes the dataset's card names, where the file itself does not."""

    def __init__(self, path: str, store: Store | None, card: Mapping[bytes, bytes]) -> None:
        super().__init__(path, store)
        self.metadata = {**card, **(self.metadata or {})}


# --- Which files ---------------------------------------------------------------------------------------


def _listed(reference: Reference) -> tuple[Listing, dict[str, list[str]]]:
    """What is there, and the parquet files of each split."""
    listing = _listing(reference.repository, reference.revision)
    files = _files_of(reference, listing)
    if not files and reference.revision is None:
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            converted = _listing(reference.repository, _CONVERTED)
        except RevisionNotFoundError:
            converted = Listing("", {}, {})
        # The card stands in the main revision alone.
        converted = Listing(
            converted.commit, converted.sizes, {**converted.card, **listing.card, "configs": None}
        )
        if found := _files_of(reference, converted):
            return converted, found
    if "train" not in files:
        there = shortened(sorted(listing.sizes)) or "none"
        raise VitralError(
            f"{reference.source} has no parquet files to train on; its files are {there}; download them with "
            "hf download --repo-type dataset, and give the folder or the shards"
        )
    return listing, files


def _files_of(reference: Reference, listing: Listing) -> dict[str, list[str]]:
    paths = sorted(path for path in listing.sizes if path.endswith(".parquet"))
    configs = listing.card.get("configs")
    by_config = _by_card(configs, paths) if isinstance(configs, list) else _by_names(paths)
    by_config = {name: files for name, files in by_config.items() if files}
    if not by_config:
        return {}
    if reference.config:
        if reference.config not in by_config:
            raise VitralError(
                f"{reference.source} has no configuration {reference.config!r}; it has "
                f"{shortened(list(by_config))}"
            )
        return by_config[reference.config]
    default = next((name for name in ("", "default") if name in by_config), None)
    if default is None and isinstance(configs, list):
        default = next(
            (c.get("config_name") for c in configs if isinstance(c, dict) and c.get("default")), None
        )
    if default is None and len(by_config) > 1:
        first = next(iter(by_config))
        raise VitralError(
            f"{reference.source} has the configurations {shortened(list(by_config))}; say which, as in "
            f"{reference.source}:{first}"
        )
    return by_config[next(iter(by_config)) if default is None else default]


def _by_names(paths: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """By configuration and split, as their names and folders say."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in paths:
        parts = PurePosixPath(path).parts
        split = next((of_part for part in reversed(parts) if (of_part := role(part))), "train")
        config = parts[0] if len(parts) > 1 and parts[0] != "data" and not role(parts[0]) else ""
        found.setdefault(config, {}).setdefault(split, []).append(path)
    return found


def _by_card(configs: Sequence[Any], paths: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """By configuration and split, as the card's ``configs`` says (hub's manual configuration)."""
    found: dict[str, dict[str, list[str]]] = {}
    for config in (config for config in configs if isinstance(config, dict)):
        patterns = _patterns(config.get("data_files"))
        splits: dict[str, list[str]] = {}
        for path in paths:
            said = next((split for split, pattern in patterns if fnmatch(path, pattern)), None)
            split = role(said) if said else None
            if split:
                splits.setdefault(split, []).append(path)
        found[str(config.get("config_name", ""))] = splits
    return found


def _patterns(data_files: Any) -> list[tuple[str, str]]:
    """(split, pattern) of a card's ``data_files``: text, a list of it, or of {split, path}."""
    if isinstance(data_files, str):
        return [(role(data_files) or "train", data_files)]
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    found = []
    for entry in data_files if isinstance(data_files, list) else ():
        if isinstance(entry, str):
            found += _patterns(entry)
        elif isinstance(entry, dict):
            paths = entry.get("path")
            paths = paths if isinstance(paths, list) else [paths]
            found += [(str(entry.get("split", "train")), str(path)) for path in paths]
    return found


def _names_of_classes(card: Mapping[str, Any], config: str) -> dict[bytes, bytes]:
    """What the card says of the columns, in the form that parquet files of the hub have it."""
    infos = card.get("dataset_info")
    infos = infos if isinstance(infos, list) else [infos]
    for info in (info for info in infos if isinstance(info, dict)):
        if config and info.get("config_name", config) != config:
            continue
        features = {}
        for feature in info.get("features") or ():
            kind = feature.get("dtype") if isinstance(feature, dict) else None
            names = kind.get("class_label", {}).get("names") if isinstance(kind, dict) else None
            if isinstance(names, dict):  # by number, as text
                names = [names[number] for number in sorted(names, key=int)]
            if isinstance(names, list):
                features[feature["name"]] = {"_type": "ClassLabel", "names": names}
        if features:
            return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    return {}


# --- Asking the hub ------------------------------------------------------------------------------------


def _listing(repository: str, revision: str | None) -> Listing:
    """What the hub says; without it, what it said the last time. A commit never changes."""
    digest = hashlib.sha256(f"{repository}@{revision}".encode()).hexdigest()[:32]
    path = cache_folder("hub") / f"{digest}.json"
    if revision and _COMMIT.fullmatch(revision) and (known := _kept_listing(path)):
        return known
    listing = _asked(repository, revision)
    if listing is None:
        from huggingface_hub.errors import LocalEntryNotFoundError

        if (known := _kept_listing(path)) is None:
            raise LocalEntryNotFoundError(f"{repository} was not listed before")
        return known
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(asdict(listing)).encode())
    return listing


def _kept_listing(path: Path) -> Listing | None:
    try:
        return Listing(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _asked(repository: str, revision: str | None) -> Listing | None:
    """None while the hub cannot be reached. Raises what the hub itself refuses."""
    from huggingface_hub import HfApi

    found = asked(
        lambda: HfApi().dataset_info(repository, revision=revision, timeout=_SECONDS, files_metadata=True)
    )
    if found is None:
        return None
    card = found.card_data.to_dict() if found.card_data else {}
    wanted = {name: card.get(name) for name in ("configs", "dataset_info")}
    sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
    return Listing(found.sha or revision or "main", sizes, wanted)


def _downloaded(reference: Reference, listing: Listing, paths: Sequence[str]) -> list[str]:
    """The files in huggingface_hub's cache; the hub is asked only for those that are not there."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    def cached() -> list[Any]:
        return [
            try_to_load_from_cache(reference.repository, path, revision=listing.commit, repo_type="dataset")
            for path in paths
        ]

    if not all(isinstance(path, str) for path in cached()):
        snapshot_download(
            reference.repository,
            repo_type="dataset",
            revision=listing.commit,
            allow_patterns=[escape(path) for path in paths],
        )
    missing = [path for path, there in zip(paths, cached(), strict=True) if not isinstance(there, str)]
    if missing:
        raise VitralError(
            f"{reference.source}: {shortened(missing)} cannot be downloaded, for the hub is out of reach; "
            "check the connection, or unset HF_HUB_OFFLINE"
        )
    return [str(path) for path in cached()]


# --- Streaming -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Remote:
    """Files on the hub, of which parts are fetched by range requests and kept."""

    repository: str
    commit: str
    sizes: Mapping[str, int]

    def footer(self, path: str) -> Any:
        import pyarrow.parquet as pq

        def fetch(kept: Path) -> None:
            with self._opened(path) as file:
                pq.ParquetFile(file).metadata.write_metadata_file(str(kept))

        return pq.read_metadata(self._kept(f"footer {path}", fetch))

    def columns(self, path: str, columns: Sequence[str]) -> Any:
        return self._table(f"columns {list(columns)} {path}", path, None, columns)

    def group(self, path: str, number: int, column: str) -> Any:
        return self._table(f"group {number} {column} {path}", path, number, [column])[column]

    def _table(self, key: str, path: str, number: int | None, columns: Sequence[str]) -> Any:
        """Columns of a row group, or of all; what is kept is mapped, so that processes share it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        def fetch(kept: Path) -> None:
            footer = self.footer(path)
            groups = range(footer.num_row_groups) if number is None else [number]
            with self._opened(path) as file:
                opened = pq.ParquetFile(file, metadata=footer, pre_buffer=True)
                table = opened.read_row_groups(groups, columns=list(columns), use_threads=False)
            with pa.OSFile(str(kept), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)

        for _ in range(2):  # another process may make room just now
            try:
                with pa.memory_map(str(self._kept(key, fetch))) as source:
                    return pa.ipc.open_file(source).read_all()
            except FileNotFoundError:
                continue
        raise VitralError(f"{self.repository}: what is kept of {path} is removed at once; give it more room")

    def _kept(self, key: str, fetch: Callable[[Path], None]) -> Path:
        def explaining(path: Path) -> None:
            with explained(f"hf://datasets/{self.repository}"):
                fetch(path)

        return FetchedFiles(cache_folder("streams")).path(
            f"{self.repository} {self.commit} {key}", explaining
        )

    def _opened(self, path: str) -> Any:
        place = f"datasets/{self.repository}@{self.commit}/{path}"
        return _file_system(os.getpid()).open(place, "rb", cache_type="none", size=self.sizes[path])


@functools.cache
def _file_system(_: int) -> Any:
    """One of this process, for connections are of no use to two."""
    from huggingface_hub import HfFileSystem

    return HfFileSystem(skip_instance_cache=True)
