"""SAEs on the Hugging Face hub: `hf://OWNER/REPO[/PATH][@REVISION]`, to a path in the hub's cache on this machine.

A branch becomes a commit first and everything is taken from that commit. Only what an SAE needs is downloaded: the file
of its weights, the configurations beside it and those one folder above. These names come from the operator's command
line, never from a client.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol, cast

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.hf_api import RepoFile

from sae_models.checkpoint import MAX_CONFIG_BYTES, PICKLES
from steer_server.catalog.catalog import CatalogError

logger = logging.getLogger(__name__)

SCHEME = "hf://"
# A part of a path begins with none of the characters that could make it an option, a hidden file or `..`.
_PART = r"[A-Za-z0-9_][A-Za-z0-9._=+:,-]*"
_LOCATION = re.compile(
    rf"(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(?P<path>(?:/{_PART})*)"
    rf"(?:@(?P<revision>{_PART}(?:/{_PART})*))?"
)

WEIGHTS = (".safetensors", ".npz")
_CONFIG = re.compile(r".*(cfg|conf|hyperparams|scaler).*\.(json|ya?ml)")
_ABOVE = ("config.json", "config.yaml")
"""What the folder above says about all SAEs in it (sparsify)."""
_COMPANIONS = ("activation_whitening.safetensors",)
_NOT_WEIGHTS = ("sparsity.safetensors", *_COMPANIONS)
_CHECKPOINTS, _FINAL = "checkpoints", ("pruned.safetensors", "final.safetensors")
"""Where OpenMOSS' trainers put weights below the configuration, and which of them they read, best first."""

_HTTPError = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""What the HTTP client raises; releases of huggingface_hub differ in the client that they use."""


Kind = Literal["file", "folder"]


@dataclass(frozen=True)
class HubLocation:
    """path: of a folder or a file in the repository, "" for all of it. revision: branch, tag or commit."""

    repo: str
    path: str
    revision: str

    def __str__(self) -> str:
        return SCHEME + "/".join(part for part in (self.repo, self.path) if part) + f"@{self.revision}"

    @staticmethod
    def parse(name: str) -> HubLocation:
        """Read `hf://OWNER/REPO[/PATH][@REVISION]`. Raises CatalogError."""
        match = _LOCATION.fullmatch(name.removeprefix(SCHEME).rstrip("/"))
        if match is None or ".." in name or len(name) > 1024:
            raise CatalogError(
                f"{name!r} is not a place on the hub: write {SCHEME}OWNER/REPO, then /PATH and @REVISION if needed, "
                "in letters, digits and . _ - = + : ,"
            )
        return HubLocation(match["repo"], match["path"].lstrip("/"), match["revision"] or "main")


def local_copy(location: HubLocation, pickles: bool = False) -> Path:
    """The path of the SAE at `location` in the hub's cache, downloaded first where it is missing.

    pickles: whether a pickled file may be what is wanted, as for `sae convert`. Raises CatalogError.
    """
    repo = location.repo
    try:
        api = HfApi()
        commit = api.resolve_revision(repo, revision=location.revision).resolved
        snapshot = _repo_folder(repo) / "snapshots" / commit
        try:
            place, files = _needed(location, _HubFiles(api, repo, commit), pickles)
            for file in files:
                api.hf_hub_download(repo, file, revision=commit)
        except (_HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            place, files = _cached(location, snapshot, pickles, error)
    except HFValidationError as error:
        raise CatalogError(f"{location}: {_first_line(error)}") from None
    except GatedRepoError:
        raise CatalogError(f"{location}: {repo} is gated: accept its terms there, and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise CatalogError(f"{location}: there is no {repo}, or it is private and HF_TOKEN is not set for it") from None
    except RevisionNotFoundError:
        raise CatalogError(f"{location}: {repo} has no revision {location.revision!r}") from None
    except RevisionResolutionError as error:
        raise _out_of_reach(location, error.__cause__ or error) from None
    except (_HTTPError, OSError) as error:
        raise CatalogError(f"{location}: it cannot be downloaded: {_first_line(error)}") from None
    for file in files:
        if not (snapshot / file).resolve().is_relative_to(_repo_folder(repo).resolve()):
            raise CatalogError(f"{location}: {snapshot / file} is a link that leads out of the hub's cache")
    return snapshot / place


class _Files(Protocol):
    """The files of one commit."""

    def kinds(self, paths: Sequence[str]) -> Mapping[str, Kind]:
        """What each of some paths is; those that are nothing are left out."""
        ...

    def listed(self, folder: str) -> Mapping[str, int]:
        """Bytes by name of the files directly in a folder; none where there is no such folder."""
        ...


class _HubFiles:
    """As the hub lists them."""

    def __init__(self, api: HfApi, repo: str, commit: str) -> None:
        self._api, self._repo, self._commit = api, repo, commit

    def kinds(self, paths: Sequence[str]) -> Mapping[str, Kind]:
        found = self._api.get_paths_info(self._repo, list(paths), revision=self._commit)
        return {entry.path: "file" if isinstance(entry, RepoFile) else "folder" for entry in found}

    def listed(self, folder: str) -> Mapping[str, int]:
        try:
            entries = list(self._api.list_repo_tree(self._repo, folder or None, revision=self._commit))
        except EntryNotFoundError:
            return {}
        return {PurePosixPath(entry.path).name: entry.size for entry in entries if isinstance(entry, RepoFile)}


class _CachedFiles:
    """As far as they are on this machine."""

    def __init__(self, snapshot: Path) -> None:
        self._snapshot = snapshot

    def kinds(self, paths: Sequence[str]) -> Mapping[str, Kind]:
        places = {path: self._snapshot / path for path in paths}
        return {name: "folder" if at.is_dir() else "file" for name, at in places.items() if at.exists()}

    def listed(self, folder: str) -> Mapping[str, int]:
        place = self._snapshot / folder
        if not place.is_dir():
            return {}
        return {path.name: path.stat().st_size for path in place.iterdir() if path.is_file()}


def _cached(location: HubLocation, snapshot: Path, pickles: bool, error: Exception) -> tuple[str, list[str]]:
    """What `_needed` gives where the hub cannot be asked, because of `error`."""
    try:
        found = _needed(location, _CachedFiles(snapshot), pickles)
    except CatalogError:
        raise _out_of_reach(location, error) from None
    if not isinstance(error, OfflineModeIsEnabled):
        logger.warning("%s: %s; using the copy of commit %s in the cache", location, _reason(error), snapshot.name)
    return found


def _needed(location: HubLocation, files: _Files, pickles: bool) -> tuple[str, list[str]]:
    """(the path to open, all files of that SAE, its weights last so that where they are, everything is)."""
    path = location.path
    above = [_join(folder, name) for folder in (_above(_above(path)), _above(path)) for name in _ABOVE]
    # Asked first, because this question alone is not asked again and again where the hub is down.
    kinds = files.kinds([*above, path, f"{path}.safetensors"] if path else above)
    if not path or kinds.get(path) == "folder":
        place = folder = path
        listed = files.listed(folder)
        weights = _weights(location, files, listed)
    else:
        place = weights = next((name for name in (path, f"{path}.safetensors") if kinds.get(name) == "file"), "")
        if not place:
            raise CatalogError(f"{location}: {location.repo} has neither a folder nor a file {path!r} there")
        folder = _above(path)
        listed = files.listed(folder)
    if weights.endswith(PICKLES) and not pickles:
        raise CatalogError(
            f"{location}: {weights} is a pickle, which can run code when it is opened, so it is not downloaded here. "
            f"Convert it once: steer-server sae convert '{location}' OUT, then use OUT"
        )
    beside = [name for name, size in listed.items() if _CONFIG.fullmatch(name) and size <= MAX_CONFIG_BYTES]
    # A cross-layer transcoder keeps the decoder of each layer in a file of its own.
    decoder = PurePosixPath(weights).name.replace("W_enc_", "W_dec_", 1)
    beside += [name for name in (*_COMPANIONS, decoder) if name in listed]
    needed = [_join(folder, name) for name in beside]
    if folder:
        needed += [name for name in (_join(_above(folder), name) for name in _ABOVE) if kinds.get(name) == "file"]
    return place, [*(name for name in needed if name != weights), weights]


def _weights(location: HubLocation, files: _Files, listed: Mapping[str, int]) -> str:
    """The path of the one file of weights in the folder that the path names."""
    found = sorted(name for name in listed if name.endswith(WEIGHTS) and name not in _NOT_WEIGHTS)
    if not found:
        below = files.listed(_join(location.path, _CHECKPOINTS))
        found = [f"{_CHECKPOINTS}/{name}" for name in _FINAL if name in below][:1]
    found = found or sorted(name for name in listed if name.endswith(PICKLES))
    if len(found) == 1:
        return _join(location.path, found[0])
    if found:
        raise CatalogError(f"{location}: it holds {len(found)} files of weights; name one of them: {_some(found)}")
    held = _some(sorted(listed)) or "no files"
    raise CatalogError(f"{location}: there are no weights ({', '.join(WEIGHTS)}) in it; it holds: {held}")


def _out_of_reach(location: HubLocation, error: BaseException) -> CatalogError:
    return CatalogError(
        f"{location}: {_reason(error)}, and the cache ({constants.HF_HUB_CACHE}) does not hold it. Use it once where "
        "the hub can be reached, or give a folder of this machine instead"
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the hub is not asked"
    # The client says that a file could not be had, and as the cause why.
    return f"the hub ({constants.ENDPOINT}) does not give it: {_first_line(error.__cause__ or error)}"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _repo_folder(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _above(path: str) -> str:
    return path.rpartition("/")[0]


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
