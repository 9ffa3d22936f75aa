"""Prose in source, docs and recipes: plain American technical English."""

import os
import re
from pathlib import Path

import pytest
from conftest import ROOT

# Phrases that read like a translation, and plain ones to use instead.
IDIOMS = {
    r"unless given": "default: ...",
    r"\bgoes on\b": "resumes, continues",
    r"\bgone on\b": "resumed, continued",
    r"\bgo on with": "resume, continue",
    r"\bgoing on\b": "resuming, continuing",
    r"held against": "compared with",
    r"\bis said\b": "is logged, is stated",
    r"\bare said\b": "are logged, are stated",
    r"\bthose of\b": "name the thing",
    r"seldom meant": "probably a mistake",
    r"put right": "fix",
    r"\bbehind (it|each|the|a|both|an|every|its|epoch|step|these|one)\b": "after",
    r"\bas many as\b": "the same number as, N",
    r"\bso many\b": "N",
    r"what else\b": "name the thing",
    r"will do\b": "is enough, is supported",
}
BRITISH = {
    "optimis": "optimiz",
    "normalis": "normaliz",
    "solaris": "solariz",
    "initialis": "initializ",
    "labelled": "labeled",
    "recognis": "recogniz",
    "synchronis": "synchroniz",
    "visualis": "visualiz",
    "colour": "color",
    "neighbour": "neighbor",
    "behaviour": "behavior",
    "centre": "center",
    r"\bgrey": "gray",
}
ALLOWED = ()  # words with British spelling that must stay, such as names in other libraries

SUFFIXES = (".py", ".md", ".yaml")
BEYOND_PROSE = {"runs", "__pycache__"}


def prose_files():
    """All sources, docs and recipes but this file, which lists the phrases to avoid."""
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in BEYOND_PROSE]
        for name in names:
            path = Path(folder, name)
            if path.suffix in SUFFIXES and path != Path(__file__).resolve():
                yield path


def occurrences(patterns, text):
    """[(line number, words found, what to write)], also of a phrase that is wrapped over two lines or comments."""
    found = []
    for pattern, instead in patterns.items():
        wrapped = pattern.replace(" ", r"[\s#]+")
        for match in re.finditer(wrapped, text, re.IGNORECASE):
            line = text.count("\n", 0, match.start()) + 1
            found.append((line, " ".join(match[0].split()), instead))
    return sorted(found)


def without(words, text):
    for word in words:
        text = text.replace(word, "-" * len(word))
    return text


FILES = sorted(prose_files())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_plain_american_english(path):
    text = without(ALLOWED, path.read_text(encoding="utf-8"))
    name = path.relative_to(ROOT)
    found = [f"{name}:{line}: {words!r}; write {to!r}" for line, words, to in occurrences(IDIOMS | BRITISH, text)]
    assert not found, f"{len(found)} places\n" + "\n".join(found)


def test_all_kinds_of_files_are_looked_at():
    names = {str(path.relative_to(ROOT)) for path in FILES}
    assert {"main_dino.py", "README.md", "docs/data.md", "recipes/demo.yaml", "tests/conftest.py"} <= names
    assert not any(name.startswith((".git", ".venv")) for name in names)


def test_a_phrase_is_found_with_its_line_also_if_it_is_wrapped():
    phrase = "goes" + " on"
    text = f"first line\n# It {phrase}.\n# It {phrase.replace(' ', chr(10) + '# ')}.\n# It is the {'col' + 'our'}.\n"
    assert [line for line, *_ in occurrences(IDIOMS, text)] == [2, 3]
    assert occurrences(BRITISH, text) == [(5, "col" + "our", "color")]


@pytest.mark.parametrize("word", ["behind a proxy", "Behind each", "behind\n    the"])
def test_behind_in_place_of_after_is_found(word):
    assert occurrences(IDIOMS, f"x {word} y")


@pytest.mark.parametrize("text", ["behind 1/sqrt(d)", "the center and its neighbors", "cargo on without"])
def test_plain_words_are_left_alone(text):
    assert not occurrences(IDIOMS | BRITISH, text)
