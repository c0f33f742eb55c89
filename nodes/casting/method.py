"""The items of a casting sheet, their file names and what comes next; without ComfyUI. All of it is ours."""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from ..inputs.words import DASH, entries

# Ours: more in one sheet can neither be looked at nor drawn.
MOST_ITEMS = 10_000
_HIGHEST_SEED = 2**63 - 1
# Bytes of UTF-8 of each entry's words in a file name, of which three, a seed and a digest fit into any file system.
_PART = 24
LONGEST_PREFIX = 30
_DIGEST = 6
# How a stem ends: with its seed and digest; after it may come the number that savers add.
FILE_NAME = re.compile(rf"_\d+-[0-9a-f]{{{_DIGEST}}}(?=(?:_\d+_?)?\.\w+$)")
_SEED = re.compile(rf"(\d{{1,19}})(?:\s*{DASH}\s*(\d{{1,19}}))?")
# What an empty placeholder leaves: a comma at the beginning or the end, one of two, a space before one.
_GAP = re.compile(r"^(?:[,，、]\s*)+|(?:\s*[,，、])+(?=\s*(?:[,，、]|$))|\s+(?=[,，、])")
_PLACEHOLDERS = ("identity", "action", "scene")
# An item that was sent on so often and is not there is left alone: it would come to nothing again.
TRIES = 2


@dataclass(frozen=True)
class Item:
    """One picture or video to make. `identity` is a file's name, or words; `stem` names its files."""

    identity: str
    action: str
    scene: str
    seed: int
    prompt: str
    stem: str


def items(
    identities: Sequence[str], actions: Sequence[str], scenes: Sequence[str], seeds: Sequence[str], template: str,
    prefix: str,
) -> list[Item]:
    """Every identity in every action, scene and seed, in this order; each argument is a list of texts of lines.

    A line of `identities` is words, a file of weights, or `file = words`; a file without words is `{subject}` in the
    prompt. No action or no scene is one without words. `prefix` begins each stem. Raises ValueError, naming the
    input, where nothing or too much is asked for.
    """
    who, what, where = lines(identities), lines(actions) or [""], lines(scenes) or [""]
    numbers = parse_seeds(seeds)
    if not who:
        raise ValueError("identities is empty: write one a line, as words or as the name of a file of weights")
    if (count := len(who) * len(what) * len(where) * len(numbers)) > MOST_ITEMS:
        raise ValueError(
            f"{len(who)} identities, {len(what)} actions, {len(where)} scenes and {len(numbers)} seeds are "
            f"{count:,} items, and a sheet has at most {MOST_ITEMS:,}: make several sheets"
        )
    made = []
    for line, action, scene, seed in itertools.product(who, what, where, numbers):
        file, _, words = line.partition("=")
        identity = file.strip()
        words = words.strip() or ("{subject}" if PurePath(identity).suffix in (".safetensors", ".ckpt") else identity)
        prompt = fill(template, identity=words, action=action, scene=scene)
        stem = "_".join([prefix, *map(_slug, (PurePath(identity).name, action, scene)), str(seed)]).replace("__", "_")
        content = "\n".join((line, action, scene, str(seed), prompt))
        stem = f"{stem}-{hashlib.sha256(content.encode()).hexdigest()[:_DIGEST]}"
        made.append(Item(identity, action, scene, seed, prompt, stem))
    return made


def lines(texts: Iterable[str]) -> list[str]:
    """The lines that say something, once each, in NFC with single spaces."""
    every = (" ".join(unicodedata.normalize("NFC", line).split()) for text in texts for line in text.splitlines())
    return list(dict.fromkeys(line for line in every if line))


def parse_seeds(texts: Iterable[str]) -> list[int]:
    """The numbers in texts such as `0-3, 7`. Raises ValueError, naming the input, for anything else."""
    numbers: list[int] = []
    for part in (part for text in texts for part in entries(text)):
        match = _SEED.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= _HIGHEST_SEED or last - first >= MOST_ITEMS:
            raise ValueError(f"seeds has {part[:40]!r}: use whole numbers and ranges such as 0-3, 7")
        numbers.extend(range(first, last + 1))
    return list(dict.fromkeys(numbers)) or [0]


def fill(template: str, **words: str) -> str:
    """The template with these words for its placeholders, and no space or comma where one is empty."""
    if not any(f"{{{name}}}" in template for name in _PLACEHOLDERS):
        listed = ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
        raise ValueError(f"prompt is {template[:40]!r} and says nothing of an item: use {listed} in it")
    filled = re.sub("{(identity|action|scene)}", lambda match: words[match[1]], template)
    return _GAP.sub("", " ".join(filled.split()))


def _slug(text: str) -> str:
    """Letters and digits of a text of any script, joined by hyphens; the digest tells apart what looks the same."""
    stem = re.sub(r"(?:_\d+_?)?\.(?:safetensors|ckpt)$", "", text)
    words = re.sub(r"[^\w]+|_+", "-", unicodedata.normalize("NFC", stem).lower()).strip("-")
    return words.encode()[:_PART].decode(errors="ignore").strip("-")


def upcoming(
    every: Sequence[Item], present: Iterable[str], sent: Mapping[str, int], at_once: int, skip_existing: bool
) -> tuple[list[Item], list[Item]]:
    """What to send on now, and what is not there although it was sent on.

    present: stems of which there is a file; sent: how often each stem was sent on since ComfyUI started. What was
    sent on least comes first. Without `skip_existing` each item is due once, whether it is there or not.
    """
    there = set(present) if skip_existing else set()
    due = [item for item in every if item.stem not in there]
    tries = TRIES if skip_existing else 1
    going = sorted((item for item in due if sent.get(item.stem, 0) < tries), key=lambda item: sent.get(item.stem, 0))
    failed = [item for item in due if sent.get(item.stem, 0)] if skip_existing else []
    return going[:at_once], failed


def links_of_savers(prompt: Mapping[str, Mapping], sheet: str, stem: int, outputs: Iterable[str]) -> list[list]:
    """What reaches those of the output nodes `outputs` to which the sheet's output number `stem` leads, each once.

    `prompt` is a graph in API form, `sheet` the id of the sheet in it; a link is [node's id, number of its output].
    """
    readers: dict[str, list[tuple[str, list]]] = {}
    for node, content in prompt.items():
        for value in content.get("inputs", {}).values():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in prompt:
                readers.setdefault(value[0], []).append((node, value))
    reached, waiting = set(), [node for node, link in readers.get(sheet, ()) if link[1] == stem]
    while waiting:
        if (node := waiting.pop()) not in reached:
            reached.add(node)
            waiting += [reader for reader, _ in readers.get(node, ())]
    savers = reached.intersection(outputs)
    links = [link for every in readers.values() for node, link in every if node in savers]
    return [list(link) for link in dict.fromkeys(map(tuple, links))]
