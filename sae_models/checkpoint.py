"""What a family's loader works on: the files that a user named, read with care, and what they said in addition."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sae_models.cache import cache_folder, file_identity, written_whole
from sae_models.errors import SAEFormatError
from sae_models.hook_points import HookPoint
from sae_models.npz import extracted
from sae_models.options import LoadOptions
from sae_models.tensor_source import SafetensorsFile, TensorSource, check_finite, check_tensor

MAX_CONFIG_BYTES = 1 << 20
HASH_CHUNK_BYTES = 1 << 22
REMEMBERED_BYTES = 1 << 26
"""Files larger than this, together, are read through once and known again by their inode, size and times."""

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")

Shapes = Mapping[str, tuple[int, ...]]
OpenPickle = Callable[[Path], TensorSource]


class Checkpoint:
    """A folder or a file, and the options that came with it.

    open_pickle: reads tensors of a pickled file. A server has none: it never unpickles.
    """

    def __init__(self, path: Path, options: LoadOptions, open_pickle: OpenPickle | None = None) -> None:
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self._options = options
        self._open_pickle = open_pickle
        self._asked: set[str] = set()
        self._opened: dict[Path, TensorSource] = {}
        self._written: list[Path] = []

    @property
    def parts(self) -> tuple[str, ...]:
        """The names on the way to it, which some families keep hook points and models in.

        Symbolic links are not followed: those of a Hugging Face cache lead to files without a name.
        """
        return self.path.absolute().parts

    def option(self, name: str) -> Any:
        """The option `name`, or None; asking is what gives an option a use."""
        self._asked.add(name)
        return getattr(self._options, name)

    def refuse_unused_options(self) -> None:
        """Raise SAEFormatError where an option was given that nothing asked for."""
        for name, value in self._options.given().items():
            if name not in self._asked:
                raise SAEFormatError(f"{self.path}: option {name}={value} has no use for this checkpoint")

    def discard(self) -> None:
        """Take out of the cache what was written there for this checkpoint, which turned out to be none."""
        for path in self._written:
            path.unlink(missing_ok=True)

    def error(self, message: str) -> SAEFormatError:
        return SAEFormatError(f"{self.path}: {message}")

    def file(self, name: str) -> Path:
        """The file `name` of the folder, or the named file itself where it is called that."""
        return self.path if self.path.name == name and self.path.is_file() else self.folder / name

    def has(self, *names: str) -> bool:
        return all(self.file(name).is_file() for name in names)

    def files(self, pattern: str) -> list[Path]:
        """The file that was named, or those in the folder that was, whose names match `pattern` as a whole."""
        found = [self.path] if self.path.is_file() else sorted(path for path in self.path.iterdir() if path.is_file())
        return [path for path in found if re.fullmatch(pattern, path.name)]

    def only_file(self, pattern: str) -> Path:
        """The one of `files(pattern)`; SAEFormatError where there are several to choose from."""
        found = self.files(pattern)
        if len(found) != 1:
            raise self.error(f"there are {len(found)} SAEs in it; name one of: {', '.join(p.name for p in found)}")
        return found[0]

    def config(self, name: str) -> dict[str, Any]:
        """The object in file `name`, which is JSON, or YAML where its name ends so."""
        path = self.file(name)
        data = self.small_file(path)
        language = "YAML" if path.suffix == ".yaml" else "JSON"
        try:
            config = yaml.safe_load(data) if language == "YAML" else json.loads(data)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise SAEFormatError(f"{path}: not {language}: {error}") from None
        if not isinstance(config, dict):
            raise SAEFormatError(f"{path}: not a configuration: expected a {language} object")
        return config

    def small_file(self, path: Path) -> bytes:
        """The bytes of a configuration file."""
        try:
            if path.stat().st_size > MAX_CONFIG_BYTES:
                raise SAEFormatError(
                    f"{path}: {path.stat().st_size} bytes; a configuration has at most {MAX_CONFIG_BYTES}"
                )
            return path.read_bytes()
        except OSError as error:
            raise SAEFormatError(f"{path}: cannot be read: {error}") from None

    def tensors(self, path: Path) -> TensorSource:
        """The tensors in a file, by the ending of its name."""
        if path.suffix == ".safetensors":
            return SafetensorsFile(path)
        if path.suffix == ".npz":
            source, is_new = extracted(path)
            if is_new:
                self._written.append(source.path)
            return source
        if path.suffix in PICKLES:
            if self._open_pickle is None:
                raise self.pickle_error(path)
            if path not in self._opened:
                self._opened[path] = self._open_pickle(path)
            return self._opened[path]
        raise SAEFormatError(f"{path}: not a file of tensors; known endings: .safetensors, .npz, {', '.join(PICKLES)}")

    def pickle_error(self, path: Path) -> SAEFormatError:
        return SAEFormatError(
            f"{path} is a pickle, which can run code when it is opened, so it is not opened here. "
            f"Convert it once: steer-server sae convert '{self.path}' OUT, then load OUT"
        )

    def pickled_names(self) -> frozenset[str]:
        """The names of the tensors in the pickle that was named; none where it is no pickle or may not be opened."""
        if self._open_pickle is None or self.path.suffix not in PICKLES or not self.path.is_file():
            return frozenset()
        return self.tensors(self.path).names()

    def length(self, source: TensorSource, name: str) -> int:
        """How long a vector is, for checkpoints that state no sizes."""
        shape = source.shape(name) if name in source.names() else ()
        if len(shape) != 1:
            check_tensor(source, name, shape)
            raise SAEFormatError(f"{source.path}: {name} has shape {list(shape)}, expected a vector")
        return shape[0]

    def hook_points(self, named: str | Sequence[str] | None) -> tuple[HookPoint, ...]:
        """Where the SAE reads: option `hook`, else what the checkpoint says (one name, several, or None)."""
        given = self.option("hook")
        names = given.split(",") if given is not None else [named] if isinstance(named, str) else list(named or ())
        return self._parsed(names, "hook")

    def hook_points_out(self, named: str | Sequence[str] | None) -> tuple[HookPoint, ...]:
        """Where a transcoder writes: option `hook_out`, else what the checkpoint says."""
        given = self.option("hook_out")
        names = given.split(",") if given is not None else [named] if isinstance(named, str) else list(named or ())
        return self._parsed(names, "hook_out")

    def _parsed(self, names: Sequence[str], option: str) -> tuple[HookPoint, ...]:
        if not names:
            place = "reads" if option == "hook" else "writes"
            raise self.error(
                f"the files do not say where it {place}; add ?{option}=blocks.<layer>.hook_resid_post to the path"
            )
        try:
            return tuple(HookPoint.parse(name.strip()) for name in names)
        except ValueError as error:
            raise self.error(f"{error}; ?{option}=NAME, added to the path, takes its place") from None

    def count(self, config: Mapping[str, Any], key: str) -> int:
        """A positive integer of a configuration."""
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{key} must be a positive integer, got {value!r}")
        return value

    def choice(self, config: Mapping[str, Any], key: str, allowed: Sequence[str]) -> str:
        """A string of a configuration, the first of `allowed` where it is missing."""
        value = config.get(key, allowed[0])
        if value not in allowed:
            raise self.error(f"{key}={value!r} is not supported; supported: {', '.join(allowed)}")
        return str(value)

    def refuse_unknown_tensors(self, source: TensorSource, known: Collection[str]) -> None:
        """Raise SAEFormatError where there are tensors that would be left out of the maths."""
        unknown = sorted(source.names() - set(known))
        if unknown:
            raise self.error(f"it holds tensors of a kind of SAE that is not supported: {', '.join(unknown)}")

    def verified(
        self, configs: Sequence[str], tensors: Sequence[tuple[TensorSource, Shapes]], said_by_path: Sequence[str] = ()
    ) -> str:
        """Check that tensors have their shapes, are floats and finite; the SHA-256 of everything read.

        configs: names of the configuration files. said_by_path: what decides how the SAE works and stands in no file,
        only in the names of files and folders. Large files are read once: as long as they stay as they are, their
        checksum is remembered.
        """
        for source, shapes in tensors:
            for name, shape in shapes.items():
                check_tensor(source, name, shape)
        digest = hashlib.sha256(b"".join(self.small_file(self.file(name)) for name in configs))
        digest.update("".join(f"\n{said}" for said in said_by_path).encode())
        paths = [source.path for source, _ in tensors]
        options = self._options.given()
        remembered = _memory(digest.hexdigest(), options, [(source.path, sorted(shapes)) for source, shapes in tensors])
        if remembered is not None and remembered.is_file():
            return remembered.read_text()
        for source, shapes in tensors:
            for name in shapes:
                check_finite(source, name)
        for path in dict.fromkeys(paths):
            with path.open("rb") as file:
                while chunk := file.read(HASH_CHUNK_BYTES):
                    digest.update(chunk)
        if options:
            digest.update(json.dumps(options, sort_keys=True).encode())
        if remembered is not None:
            with written_whole(remembered) as temporary:
                temporary.write_text(digest.hexdigest())
        return digest.hexdigest()


def _memory(configs: str, options: Mapping[str, object], files: Sequence[tuple[Path, list[str]]]) -> Path | None:
    """The file that remembers the checksum of these files as they are now; None where reading them costs little."""
    if sum(path.stat().st_size for path, _ in files) < REMEMBERED_BYTES:
        return None
    seen = [(file_identity(path), names) for path, names in files]
    key = hashlib.sha256(json.dumps([configs, sorted(options.items()), seen]).encode()).hexdigest()
    return cache_folder() / "checked" / key
