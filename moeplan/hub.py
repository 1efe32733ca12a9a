"""Models on the Hub: `ORG/NAME`, or `ORG/NAME@REVISION`.

Their small files (config, index, tokenizer) go through huggingface_hub's cache, where everything else finds them, too.
Weights that are in the cache are read there. Of others, planning reads the headers alone, as HTTP ranges; a merge
downloads those files into the cache, or streams the ranges that it needs.

Names, tokens, the cache's place and offline mode are huggingface_hub's business (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`,
`HF_HUB_OFFLINE` ...). It is imported when a name is used.
"""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from executor.errors import RunError
from executor.patience import ATTEMPTS, SILENT_SECONDS, TIMEOUT_SECONDS, asked_seconds, pause_seconds
from moeplan import interruption
from moeplan.checkpoint import BIN_INDEX, CONFIG, INDEX, MAX_INDEX_NBYTES, PREFERRED
from moeplan.errors import MoeplanWarning
from moeplan.hub_download import SilentBar, StoppedError, plainly, remove_halves
from moeplan.hub_errors import answer_of, breaks_off, check_endpoint, explanation, is_busy, refuse_address
from moeplan.hub_stream import HEADS_AT_ONCE, RemoteStream
from moeplan.output import CARD
from moeplan.places import MAX_CONFIG_NBYTES, CheckpointError, LocalPlace, Place, instead_of
from moeplan.untrusted_json import show
from planner.expr import RemoteFile, Source, SourceFile

if TYPE_CHECKING:
    from executor.remote import RemoteReader

NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?")

HEAD_NBYTES = 32 << 10
"""What of a file of weights is asked for first: the header of a shard of ordinary size fits."""

MAX_CARD_NBYTES = 128 << 10
"""A larger one is not worth fetching to know a licence."""

MAX_HEADS = 256

_SHA256 = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the Hub lists it. `digest` is its content's: sha256 of large files, git's SHA-1 of others."""

    nbytes: int
    digest: str


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A model on the Hub at one commit.

    `path` is its directory in the cache; `files` are all that the Hub has, none where it was not asked.
    """

    hub: Hub
    label: str
    repository: str
    commit: str
    path: Path
    files: Mapping[str, HubFile]

    def names(self) -> Collection[str]:
        return self.files or LocalPlace(self.path).names()

    def has(self, name: str) -> bool:
        return name in self.files or os.path.lexists(self.path / name)

    def is_here(self, name: str) -> bool:
        """Whether the file `name` is in the cache."""
        return (self.path / name).exists()

    def prepare(self, names: Collection[str]) -> None:
        missing = [name for name in names if name in self.files and not self._is_read_here(name)][:MAX_HEADS]
        try:
            with ThreadPoolExecutor(HEADS_AT_ONCE) as workers:
                list(workers.map(self.hub.head, map(self._remote, missing)))
        except RunError as error:
            raise CheckpointError(str(error)) from None

    @property
    def incomplete(self) -> str:
        from huggingface_hub import constants

        if self.files:
            return f"what it has is listed on {self.hub.endpoint}/{self.repository}"
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{self.hub.endpoint} cannot be reached"
        return f"not all of it is in the cache, {self.hub.cache}, and {why}"

    @contextmanager
    def opened(self, name: str) -> Iterator[tuple[BinaryIO, Source]]:
        if not self.files and not self.is_here(name):
            raise CheckpointError(f"{self.label}: has no {name}; {self.incomplete}")
        if self._is_read_here(name) or name not in self.files:
            with LocalPlace(self.path).opened(name) as (file, source):
                self._check_size(name, source)
                yield file, self.hub.one_source(self._digest(name), source)
            return
        remote = self._remote(name)
        first = self.hub.one_source(remote.etag, remote)
        if isinstance(first, SourceFile):  # under another name, it is in the cache
            with open(first.path, "rb") as stream:
                yield stream, first
            return
        try:
            head = self.hub.head(first)
            with RemoteStream(self.hub, first, head) as stream:
                yield stream, first
        except RunError as error:
            raise CheckpointError(str(error)) from None

    def _check_size(self, name: str, source: SourceFile) -> None:
        """Raises CheckpointError where a file in the cache is no longer whole: huggingface_hub would leave it so."""
        if name in self.files and source.nbytes != self.files[name].nbytes:
            raise CheckpointError(
                f"{self.label}/{name}: has {self.files[name].nbytes:,} bytes on the Hub, and {source.nbytes:,} in the "
                f"cache: remove {source.path}, and it is downloaded again"
            )

    def fetch(self, names: Collection[str], max_nbytes: int) -> None:
        """Have the small files `names` in the cache, those that there are. Raises CheckpointError."""
        for name in names:
            if name not in self.files or self.is_here(name):
                continue
            if self.files[name].nbytes > max_nbytes:
                raise CheckpointError(f"{self.label}/{name}: is larger than {max_nbytes:,} bytes; a real one is not")
            self.hub.download_one(self, name)

    def link(self) -> None:
        """Have in its directory what the cache has of other commits: most commits change a file or two."""
        with suppress(OSError):  # there is none, or it cannot be written to
            blobs = {blob.name for blob in (self.path.parent.parent / "blobs").iterdir()}
            for name, file in self.files.items():
                if file.digest in blobs and "/" not in name and not os.path.lexists(self.path / name):
                    self.path.mkdir(parents=True, exist_ok=True)
                    (self.path / name).symlink_to(f"../../blobs/{file.digest}")

    def _is_read_here(self, name: str) -> bool:
        return self.is_here(name) and self.lasting_name(name) not in self.hub.streamed

    def lasting_name(self, name: str) -> str:
        """What the file `name` is called, whichever Hub has it."""
        return f"{self.repository}@{self.commit}/{name}"

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repository, name, revision=self.commit, endpoint=self.hub.endpoint)

    def _remote(self, name: str) -> RemoteFile:
        file = RemoteFile(self._url(name), self.files[name].digest, self.files[name].nbytes)
        self.hub.remember(file, self, name)
        return file

    def _digest(self, name: str) -> str | None:
        """The digest of a file's content; None where nobody says it."""
        if name in self.files:
            return self.files[name].digest
        blob = Path(os.path.realpath(self.path / name)).name
        return blob if _SHA256.fullmatch(blob) else None


class Hub:
    """The Hub, as one merge sees it: what was asked, where things are. `cache` is a directory for huggingface_hub.

    Models that `commits` has are those commits, wherever their branches are by now, and the files whose lasting names
    are `streamed` are read there, though they may be in the cache by now.
    """

    def __init__(
        self,
        cache: str | Path | None = None,
        commits: Mapping[str, str] | None = None,
        streamed: Collection[str] = (),
    ) -> None:
        self._asked_for = cache
        self._asked_commits = commits or {}
        self.streamed = streamed
        self._snapshots: dict[str, Snapshot] = {}
        self._sources: dict[str, Source] = {}
        self._places: dict[RemoteFile, tuple[Snapshot, str]] = {}
        self._heads: dict[RemoteFile, bytes] = {}
        self._is_away = False
        self._stopping = Event()
        self._reader: RemoteReader | None = None
        self._reader_lock = Lock()

    def anew(self) -> Hub:
        """The same models at the same commits, with what is in the cache by now."""
        hub = Hub(self._asked_for, self._asked_commits, self.streamed)
        hub._snapshots = {name: replace(snapshot, hub=hub) for name, snapshot in self._snapshots.items()}
        for snapshot in hub._snapshots.values():
            snapshot.link()
        return hub

    @property
    def commits(self) -> dict[str, str]:
        """The commit of each model that was opened, by what the YAML calls it."""
        return {reference: snapshot.commit for reference, snapshot in self._snapshots.items()}

    @property
    def endpoint(self) -> str:
        """The Hub's address."""
        from huggingface_hub import constants

        return constants.ENDPOINT

    @property
    def cache(self) -> Path:
        """The directory that models are downloaded into."""
        from huggingface_hub import constants

        return Path(self._asked_for or constants.HF_HUB_CACHE).expanduser().resolve()

    @property
    def headers(self) -> dict[str, str]:
        """What is sent with each request to the Hub: the user's token, if there is one. Empty where no name is used."""
        if not self._snapshots:
            return {}
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        return {name.title(): value for name, value in build_hf_headers(library_name="moeplan").items()}

    def place(self, reference: str, config: str = CONFIG) -> Place:
        """Where the model or adapter is that the YAML calls `reference`: in that directory, if there is one, or here.

        `config` is the name of its config file. Raises CheckpointError for what is on the Hub and cannot be had.
        """
        refuse_address(reference)
        name = NAME.fullmatch(reference)
        if name is None or _may_be_here(reference):
            return LocalPlace(Path(reference))
        if reference not in self._snapshots:
            revision = self._asked_commits.get(reference) or name["revision"] or "main"
            try:
                found = self._found(reference, name["repository"], revision, config)
            except CheckpointError as error:
                is_begun = reference in self._asked_commits
                begun = "; an unfinished merge was begun with it: --restart starts afresh"
                raise CheckpointError(f"{error}{begun if is_begun else instead_of(reference)}") from None
            self._snapshots[reference] = found
            found.link()
            found.fetch([config], MAX_CONFIG_NBYTES)
            weights = next(filter(found.has, PREFERRED), None)
            if weights in (INDEX, BIN_INDEX):
                found.fetch([weights], MAX_INDEX_NBYTES)
            if CARD in found.files and found.files[CARD].nbytes <= MAX_CARD_NBYTES:
                try:
                    found.fetch([CARD], MAX_CARD_NBYTES)
                except CheckpointError as error:  # such as a cache that is shared, holds all else, and is read-only
                    warnings.warn(f"{error}; so its licence is not known", MoeplanWarning, stacklevel=2)
        return self._snapshots[reference]

    def snapshot(self, path: Path) -> Snapshot | None:
        """The model whose directory in the cache `path` is."""
        return next((snapshot for snapshot in self._snapshots.values() if snapshot.path == path), None)

    def _found(self, reference: str, repository: str, revision: str, config: str) -> Snapshot:
        check_endpoint(reference)
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise CheckpointError(
                f"{reference}: there is no such directory, and no model on the Hub has such a name: {show(str(error))}"
            ) from None
        if constants.HF_HUB_OFFLINE:
            cached = self._cached(reference, repository, revision, config)
            if cached is None:
                raise CheckpointError(
                    f"{reference}: is neither a directory nor in the cache, {self.cache}, and HF_HUB_OFFLINE is set"
                )
            return cached
        api = HfApi(endpoint=self.endpoint, library_name="moeplan")
        try:
            info = self._patiently(
                lambda: api.model_info(repository, revision=revision, timeout=TIMEOUT_SECONDS, files_metadata=True),
                attempts=1 if self._is_away else ATTEMPTS,  # what was waited for in vain is not waited for again
            )
        except Exception as error:  # huggingface_hub raises what its HTTP library of the day raises, too
            self._is_away = answer_of(error) is None or is_busy(error)
            is_downloaded = reference in self._asked_commits and not self.streamed
            is_taken = self._is_away or is_downloaded
            cached = self._cached(reference, repository, revision, config) if is_taken else None
            reason = explanation(error, repository, revision, endpoint=self.endpoint, cache=self.cache)
            if cached is None:
                if self._is_away and reference.count("/") == 1:
                    reason += "; if this is meant as a directory, there is none"
                raise CheckpointError(f"{reference}: {reason}") from None
            warnings.warn(f"{reference}: {reason}; what is in the cache is taken", MoeplanWarning, stacklevel=2)
            return cached
        if info.sha is None:
            raise CheckpointError(f"{reference}: {self.endpoint} does not say which commit this is; is it a Hub?")
        files = {}
        for file in info.siblings or ():
            digest = file.lfs.sha256 if file.lfs is not None else file.blob_id
            if file.size is not None and digest is not None:
                files[file.rfilename] = HubFile(file.size, digest)
        if not files:
            raise CheckpointError(f"{reference}: has no files on {self.endpoint}")
        return Snapshot(self, reference, repository, info.sha, self._directory(repository, info.sha, revision), files)

    def _directory(self, repository: str, commit: str, revision: str) -> Path:
        """A commit's directory in the cache, whose note of the commit that `revision` is, for offline use, is renewed.

        The layout of the cache is public: huggingface_hub's guide "Understand caching" describes it.
        """
        directory = self.cache / f"models--{repository.replace('/', '--')}"
        note = directory / "refs" / revision
        with suppress(OSError):  # a cache that cannot be written to may hold everything
            note.parent.mkdir(parents=True, exist_ok=True)
            if revision != commit and not (note.exists() and note.read_text() == commit):
                note.write_text(commit)
        return directory / "snapshots" / commit

    def _cached(self, reference: str, repository: str, revision: str, config: str) -> Snapshot | None:
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(repository, config, cache_dir=self.cache, revision=revision)
        if not isinstance(file, str):
            return None
        path = Path(file).parent
        return Snapshot(self, reference, repository, path.name, path, {})

    def download_one(self, snapshot: Snapshot, name: str, bar: type | None = None) -> None:
        """Download the file `name` into the cache; `bar` stands in for tqdm. Raises CheckpointError."""
        from huggingface_hub import hf_hub_download

        interruption.clear_at_end(remove_halves)  # for good: who interrupts may leave threads behind that are at it
        # Versions before 1 have no bar to replace here, and show their own.
        bars = {"tqdm_class": bar or SilentBar} if "tqdm_class" in inspect.signature(hf_hub_download).parameters else {}
        try:
            with plainly:
                self._patiently(
                    lambda: hf_hub_download(
                        snapshot.repository,
                        name,
                        revision=snapshot.commit,
                        cache_dir=self.cache,
                        endpoint=self.endpoint,
                        library_name="moeplan",
                        **cast(Any, bars),
                    ),
                    lambda error: is_busy(error) or breaks_off(error),
                )
        except StoppedError:
            raise
        except Exception as error:
            reason = explanation(error, snapshot.repository, snapshot.commit, endpoint=self.endpoint, cache=self.cache)
            raise CheckpointError(f"{snapshot.label}/{name}: {reason}") from None

    def check_downloadable(self, files: Collection[RemoteFile]) -> None:
        """See that `files` are no larger than huggingface_hub downloads over HTTP. Raises CheckpointError."""
        from huggingface_hub import constants

        limit = constants.MAX_HTTP_DOWNLOAD_SIZE
        for file in files:
            snapshot, name = self._places[file]
            if file.nbytes > limit:
                raise CheckpointError(
                    f"{snapshot.label}/{name}: is larger than the {limit / 1e9:.0f} GB that can be downloaded: "
                    f"use --stream, or run `hf download {snapshot.repository}` first"
                )

    @property
    def holds_weights(self) -> bool:
        """Whether it holds weights of a model that was opened, which are not in the cache."""
        return bool(self._places)

    def download(self, files: Collection[RemoteFile], workers: int, on_progress: Callable[[int], None]) -> None:
        """Download whole `files` into the cache, up to `workers` at once.

        `on_progress` is told how many bytes came, and of a file that must be begun again, how many were lost. Raises
        RunError.
        """
        stopping = self._stopping

        class Bar(SilentBar):
            nbytes = 0

            def update(self, n: float | None = 1) -> None:
                if stopping.is_set():
                    raise StoppedError
                self.nbytes += int(n or 0)
                on_progress(int(n or 0))

            def __exit__(self, *error: object) -> None:
                if error[0] is not None:
                    on_progress(-self.nbytes)

        def download(file: RemoteFile) -> None:
            snapshot, name = self._places[file]
            self.download_one(snapshot, name, Bar)

        with plainly, ThreadPoolExecutor(workers) as pool:
            try:
                list(pool.map(download, files))
            except CheckpointError as error:
                raise RunError(
                    f"{error}; files that came whole are kept: run the same command again to go on"
                ) from None
            finally:
                stopping.set()
                pool.shutdown(cancel_futures=True)

    def _patiently(
        self, ask: Callable[[], T], may_pass: Callable[[Exception], bool] = is_busy, attempts: int = ATTEMPTS
    ) -> T:
        """What `ask` returns, which is asked again where what went wrong `may_pass`, as is said in
        `executor.patience`."""
        for failures in range(1, attempts):
            try:
                return ask()
            except Exception as error:
                if not may_pass(error):
                    raise
                answer = answer_of(error)
                asked = None if answer is None else asked_seconds(answer.headers)
            self._pause(pause_seconds(failures, asked))
        return ask()

    def _pause(self, seconds: float) -> None:
        if seconds > SILENT_SECONDS:
            warn_of_wait(self.endpoint, seconds)
        if self._stopping.wait(seconds):
            raise StoppedError

    def one_source(self, digest: str | None, source: Source) -> Source:
        """The source by which this content was first read, whatever it is called."""
        if digest is None:
            return source
        first = self._sources.setdefault(digest, source)
        return first if first.nbytes == source.nbytes else source

    def remember(self, file: RemoteFile, snapshot: Snapshot, name: str) -> None:
        """Remember where `file` is from."""
        self._places[file] = (snapshot, name)

    def lasting_name(self, file: RemoteFile) -> str:
        """What a file is called, whichever Hub has it."""
        snapshot, name = self._places[file]
        return snapshot.lasting_name(name)

    def read(self, file: RemoteFile, offset: int, nbytes: int) -> bytes:
        """Bytes of a file on the Hub. Raises RunError."""
        with self._reader_lock:
            if self._reader is None:
                from executor.remote import RemoteReader  # here, because TLS takes memory that most plans can spare

                self._reader = RemoteReader(self.headers, warn_of_wait)
        return self._reader.read(file, offset, nbytes)

    def close_connections(self) -> None:
        """Close those that are idle. What is read afterwards opens others."""
        if self._reader is not None:
            self._reader.close()

    def head(self, file: RemoteFile) -> bytes:
        """The beginning of a file on the Hub. Raises RunError."""
        if file not in self._heads:
            self._heads[file] = self.read(file, 0, min(file.nbytes, HEAD_NBYTES))
        return self._heads[file]


def warn_of_wait(server: str, seconds: float) -> None:
    message = f"{server} is busy, or breaks off: it is asked again in {seconds:.0f} seconds"
    warnings.warn(message, MoeplanWarning, stacklevel=2)


def _may_be_here(path: str) -> bool:
    """Whether there is something at `path`, or may be, where this user must not look."""
    try:
        os.lstat(path)
    except PermissionError:
        return True
    except OSError:
        return False
    return True
