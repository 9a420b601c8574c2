"""Build the prose half of the training corpus from Debian packages.

Every source is a package of the Debian archive, fetched with `apt-get download` and unpacked with
`dpkg-deb -x`: nothing is installed and no root is needed. Output: one JSON object per line,
`{"source": <package>, "text": <a document of a few hundred words>}`.
"""

import gzip
import html
import json
import random
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import typer

WORDS_PER_DOCUMENT = 350


class _TextOnly(HTMLParser):
    """Visible text of an HTML page; scripts, styles and navigation are dropped."""

    SKIPPED = frozenset({"script", "style", "nav", "head"})
    BLOCKS = frozenset({"p", "div", "li", "h1", "h2", "h3", "h4", "pre", "br", "tr", "dt", "dd"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skip_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SKIPPED:
            self._skip_depth += 1
        elif tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.SKIPPED and self._skip_depth:
            self._skip_depth -= 1

    def handle_data(self, data: str) -> None:
        if not self._skip_depth:
            self.parts.append(data)


def html_text(page: str) -> str:
    parser = _TextOnly()
    parser.feed(page)
    lines = (re.sub(r"\s+", " ", line).strip() for line in "".join(parser.parts).splitlines())
    return "\n".join(line for line in lines if line)


def bible(root: Path) -> Iterator[str]:
    run = subprocess.run(
        ["bible", "-f", "-p", str(root / "usr/lib")],
        input="gen1:1-rev22:21\nq\n",
        capture_output=True,
        text=True,
        check=True,
    )
    for line in run.stdout.splitlines():
        verse = re.match(r"[1-3]?[A-Z]\w+:\d+ (.*)", line) or re.match(r"\w+\d+:\d+ (.*)", line)
        if verse:
            yield verse[1]


def fortunes(root: Path) -> Iterator[str]:
    for path in sorted((root / "usr/share/games/fortunes").iterdir()):
        if path.suffix or path.name in {"ascii-art", "translate-me"}:
            continue
        for cookie in path.read_text(errors="replace").split("\n%\n"):
            if len(cookie.split()) >= 8:
                yield cookie.strip()


def gcide(root: Path) -> Iterator[str]:
    text = gzip.decompress((root / "usr/share/dictd/gcide.dict.dz").read_bytes()).decode(errors="replace")
    for entry in text.split("\n\n"):
        cleaned = re.sub(r"[{}]|\[1913 Webster\]", "", entry)
        cleaned = re.sub(r"\s+", " ", cleaned).strip()
        if len(cleaned.split()) >= 12:
            yield cleaned


def jargon(root: Path) -> Iterator[str]:
    text = gzip.decompress((root / "usr/share/dictd/jargon.dict.dz").read_bytes()).decode(errors="replace")
    for entry in re.split(r"\n(?=\S)", text):
        cleaned = re.sub(r"[{}]", "", re.sub(r"\s+", " ", entry)).strip()
        if len(cleaned.split()) >= 12:
            yield cleaned


def python_docs(root: Path) -> Iterator[str]:
    for path in sorted((root / "usr/share/doc/python3.11/html/_sources").rglob("*.rst.txt")):
        text = path.read_text(errors="replace")
        text = re.sub(r":[\w:]+:`~?([^`<]+)[^`]*`", r"\1", text)
        for paragraph in text.split("\n\n"):
            if not paragraph.lstrip().startswith(("..", ":", "=", "*")) and len(paragraph.split()) >= 12:
                yield paragraph.strip()


def handbook(root: Path) -> Iterator[str]:
    pages = root / "usr/share/doc/debian-handbook/html/en-US"
    for path in sorted(pages.glob("*.html")):
        for paragraph in html_text(path.read_text(errors="replace")).split("\n"):
            if len(paragraph.split()) >= 20:
                yield paragraph


def wordnet(root: Path) -> Iterator[str]:
    for part in ("noun", "verb", "adj", "adv"):
        for line in (root / f"usr/share/wordnet/data.{part}").read_text(errors="replace").splitlines():
            head, _, gloss = line.partition(" | ")
            if gloss and len(gloss.split()) >= 8:
                yield f"{head.split()[4].replace('_', ' ')}: {html.unescape(gloss.strip())}"


# Package, licence, paragraphs, and the share of the corpus in words.
SOURCES: list[tuple[str, str, Callable[[Path], Iterator[str]], int]] = [
    ("bible-kjv-text", "public domain", bible, 220_000),
    ("fortunes", "public domain and BSD", fortunes, 260_000),
    ("dict-gcide", "GPL-3.0-or-later", gcide, 260_000),
    ("dict-jargon", "public domain", jargon, 180_000),
    ("python3.11-doc", "PSF-2.0", python_docs, 260_000),
    ("debian-handbook", "GPL-2.0-or-later or CC-BY-SA-3.0", handbook, 220_000),
    ("wordnet-base", "WordNet 3.0 licence", wordnet, 160_000),
]


def fetch(package: str, folder: Path) -> Path:
    """Unpack `package` under `folder` and return its root."""
    downloads = folder / "downloads" / package
    downloads.mkdir(parents=True)
    subprocess.run(["apt-get", "download", "-q", package], cwd=downloads, check=True, capture_output=True)
    (archive,) = downloads.glob("*.deb")
    root = folder / "roots" / package
    root.mkdir(parents=True)
    subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)
    return root


def documents(paragraphs: list[str], words: int, separator: str = "\n\n") -> Iterator[str]:
    """Join paragraphs into documents of about WORDS_PER_DOCUMENT words, `words` words in all."""
    current: list[str] = []
    size = taken = 0
    for paragraph in paragraphs:
        current.append(paragraph)
        size += len(paragraph.split())
        if size >= WORDS_PER_DOCUMENT:
            yield separator.join(current)
            taken += size
            current, size = [], 0
            if taken >= words:
                return


def main(out: Path = Path("corpus.jsonl"), seed: int = 0) -> None:
    """Write the prose corpus to OUT, its documents shuffled over the sources."""
    rng = random.Random(seed)
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for package, licence, extract, words in SOURCES:
            root = fetch(package, Path(scratch))
            paragraphs = list(extract(root))
            # Dictionary entries are alphabetical and independent; running text keeps its order.
            if package in {"dict-gcide", "wordnet-base", "fortunes"}:
                rng.shuffle(paragraphs)
            texts = list(documents(paragraphs, words, "\n" if package == "bible-kjv-text" else "\n\n"))
            count = sum(len(text.split()) for text in texts)
            typer.echo(f"{package:18} {licence:36} {len(texts):6,} documents {count:9,} words")
            lines += [json.dumps({"source": package, "text": text}) for text in texts]
    rng.shuffle(lines)
    out.write_text("\n".join(lines) + "\n")
    typer.echo(f"{len(lines):,} documents written to {out}")


if __name__ == "__main__":
    typer.run(main)
