"""One SQLite file per SAE: what is known of its features, searchable by words.

The file stands beside the weights, named FILE_NAME. Readers open it read-only.
"""

from __future__ import annotations

import json
import re
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sae_models.features.feature import Context, Evidence, Feature, TokenScore
from sae_models.features.labels import Label

FILE_NAME = "features.sqlite"
FORMAT_VERSION = 1
MAX_QUERY_WORDS = 32

# A label that someone wrote says more than the tokens that speak for it, and those more than the texts around them.
LABEL_WEIGHT, TOKENS_WEIGHT, CONTEXTS_WEIGHT = 10.0, 3.0, 1.0

SCHEMA = """
CREATE TABLE evidence (json TEXT NOT NULL);
CREATE TABLE features (
    feature INTEGER PRIMARY KEY,
    label TEXT NOT NULL,
    label_source TEXT NOT NULL,
    density REAL,
    max_activation REAL,
    decoder_norm REAL,
    detail BLOB NOT NULL
);
CREATE VIRTUAL TABLE words USING fts5(label, tokens, contexts, content='', tokenize='porter unicode61');
"""


class FeatureStoreError(ValueError):
    """A file that cannot be read as the evidence of this SAE, or cannot be written."""


@dataclass(frozen=True)
class SearchHit:
    """A feature that a search found, without its detail. score: larger is better (BM25)."""

    feature: Feature
    score: float


def create_store(path: Path, evidence: Evidence, features: Iterable[Feature]) -> None:
    """Write a new file at `path`, replacing one that is there only once it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(partial)) as db:
            with db:
                db.executescript(SCHEMA)
                db.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
                db.execute("INSERT INTO evidence VALUES (?)", (json.dumps(asdict(evidence)),))
                for feature in features:
                    _insert(db, feature)
                db.execute("INSERT INTO words(words) VALUES ('optimize')")
            db.execute("VACUUM")
        partial.replace(path)
    except (OSError, sqlite3.Error) as error:
        partial.unlink(missing_ok=True)
        raise FeatureStoreError(f"{path}: cannot be written: {error}") from None


def relabelled(features: Iterable[Feature], labels: Iterable[Label]) -> Iterator[Feature]:
    """The features with these labels; one that was read yields only to one that was read."""
    new = {label.index: label for label in labels}
    for feature in features:
        label = new.get(feature.index)
        if label is not None and (label.source == "read" or feature.label_source != "read"):
            feature = replace(feature, label=label.label, label_source=label.source)
        yield feature


class FeatureStore:
    """The evidence of one SAE. Raises FeatureStoreError where the file is damaged or of another SAE."""

    def __init__(self, path: Path, sae_sha256: str | None = None) -> None:
        """sae_sha256: of the SAE that the file must belong to, where that is known."""
        self.path = path
        with self._connect() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version != FORMAT_VERSION:
                raise FeatureStoreError(f"{path}: format {version}, this version reads {FORMAT_VERSION}")
            row = db.execute("SELECT json FROM evidence").fetchone()
            if row is None:
                raise FeatureStoreError(f"{path}: holds no evidence")
            self.evidence = _evidence(row[0])
        if sae_sha256 is not None and self.evidence.sae_sha256 != sae_sha256:
            raise FeatureStoreError(
                f"{path}: describes an SAE with sha256 {self.evidence.sae_sha256[:12]}, not {sae_sha256[:12]}; "
                "run `steer-server sae explain` again"
            )

    def get(self, index: int) -> Feature:
        """A feature with all its evidence. Raises KeyError where there is none of it."""
        with self._connect() as db:
            row = db.execute("SELECT * FROM features WHERE feature = ?", (index,)).fetchone()
            if row is None:
                raise KeyError(index)
            return _feature(row)

    def search(self, query: str, limit: int = 10) -> list[SearchHit]:
        """Features whose label, tokens or contexts hold words of `query`, best first; those that never fire are left
        out.

        Anything may be searched for: operators of FTS5 are words like all others, and a query without words finds
        nothing.
        """
        words = re.findall(r"\w+", query)[:MAX_QUERY_WORDS]
        if not words:
            return []
        expression = " OR ".join(f'"{word}"' for word in words)
        with self._connect() as db:
            rows = db.execute(
                f"SELECT features.*, -bm25(words, {LABEL_WEIGHT}, {TOKENS_WEIGHT}, {CONTEXTS_WEIGHT}) AS score "
                "FROM words JOIN features ON features.feature = words.rowid "
                "WHERE words MATCH ? AND features.density IS NOT 0 ORDER BY score DESC, feature LIMIT ?",
                (expression, limit),
            )
            return [SearchHit(_feature(row), row["score"]) for row in rows]

    def __iter__(self) -> Iterator[Feature]:
        with self._connect() as db:
            for row in db.execute("SELECT * FROM features ORDER BY feature"):
                yield _feature(row)

    def relabel(self, labels: Iterable[Label]) -> int:
        """Rewrite the file with these labels, as `relabelled` puts them in, and return how many changed it."""
        before = list(self)
        after = list(relabelled(before, labels))
        create_store(self.path, self.evidence, after)
        return sum(old != new for old, new in zip(before, after, strict=True))

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        if not self.path.is_file():
            raise FeatureStoreError(f"{self.path}: no such file")
        try:
            # Immutable: no lock files beside a file in a read-only folder.
            with closing(sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as db:
                db.row_factory = sqlite3.Row
                yield db
        except (sqlite3.DatabaseError, _MalformedError) as error:
            raise FeatureStoreError(f"{self.path}: not a readable feature file: {error}") from None


class _MalformedError(Exception):
    """A row that does not hold what this module writes."""


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, zlib.error) as error:
        raise _MalformedError(f"{what}: {type(error).__name__}: {error}") from None


def _insert(db: sqlite3.Connection, feature: Feature) -> None:
    plain = ("index", "label", "label_source", "density", "max_activation", "decoder_norm")
    detail = {key: value for key, value in asdict(feature).items() if key not in plain}
    packed = zlib.compress(json.dumps(detail, separators=(",", ":"), ensure_ascii=False).encode())
    db.execute("INSERT INTO features VALUES (?, ?, ?, ?, ?, ?, ?)", (*(getattr(feature, key) for key in plain), packed))
    # An automatic label is made of tokens that are searched as such.
    label = "" if feature.label_source == "automatic" else feature.label
    tokens = " ".join(t.token for t in (*feature.informative, *feature.raised))
    contexts = " ".join("".join(context.tokens) for context in feature.contexts)
    db.execute(
        "INSERT INTO words(rowid, label, tokens, contexts) VALUES (?, ?, ?, ?)",
        (feature.index, label, tokens, contexts),
    )


def _feature(row: sqlite3.Row) -> Feature:
    with _reading(f"feature {row['feature']}"):
        detail = json.loads(zlib.decompress(row["detail"]))
        return Feature(
            index=row["feature"],
            label=row["label"],
            label_source=row["label_source"],
            density=row["density"],
            max_activation=row["max_activation"],
            decoder_norm=row["decoder_norm"],
            quantiles=tuple(detail["quantiles"]),
            raised=_scores(detail["raised"]),
            lowered=_scores(detail["lowered"]),
            informative=_scores(detail["informative"]),
            contexts=tuple(_context(context) for context in detail["contexts"]),
        )


def _scores(items: list[dict[str, Any]]) -> tuple[TokenScore, ...]:
    return tuple(TokenScore(item["token"], item["score"]) for item in items)


def _context(item: dict[str, Any]) -> Context:
    span = item["span"]
    return Context(
        tokens=tuple(item["tokens"]),
        activations=tuple(item["activations"]),
        peak=item["peak"],
        span=None if span is None else (span[0], span[1]),
    )


def _evidence(text: str) -> Evidence:
    with _reading("evidence"):
        data = json.loads(text)
        return Evidence(**data | {"sources": tuple(data["sources"])})
