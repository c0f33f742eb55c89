"""What a label says of a result: where the graph got it from, and the manifest (C2PA 2) that says so; no ComfyUI."""

from __future__ import annotations

import dataclasses
import graphlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .config import GENERATOR, SOURCE_TYPES, VENDOR

_OURS = "Understudy"  # begins the ids of the pack's nodes
_CONSENT = "UnderstudyConsentRecord"  # makes nothing, and its note is not for everybody
_WATERMARK = re.compile("watermark|水印|透かし|ウォーターマーク", re.IGNORECASE)
_REMOVING = re.compile("remov|eras|去除|去水印|除去", re.IGNORECASE)
_READING = re.compile("detect|decod|extract|read|verif|check|检测|検出", re.IGNORECASE)
# Inputs through which a node hands on the picture itself: a mark before a VAE Encode is not in the result.
_PICTURE = re.compile(r"(image|video|frame|picture|pixel|destination)s?_?\d*", re.IGNORECASE)
_FOLDERS = ("folder", "directory")  # inputs of nodes that load all the files in one
_LARGEST = 2**63 - 1  # whole number in a manifest


@dataclasses.dataclass(frozen=True)
class Step:
    """A node of a method that led to the result: its class and the values that it had."""

    class_type: str
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Text:
    """A widget's text, which may name a file: the inputs that have it, and those of the methods that it reaches."""

    inputs: tuple[str, ...]
    uses: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Trace:
    """What led to a node: the methods' nodes, the first one first; the texts of all widgets; those that name folders;
    nodes that put a watermark into the picture, or take one out.
    """

    steps: tuple[Step, ...] = ()
    texts: dict[str, Text] = dataclasses.field(default_factory=dict)
    folders: tuple[str, ...] = ()
    watermarks: tuple[str, ...] = ()
    removers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ingredient:
    """A file that went into the result: its name, SHA-256 in hex digits, and as what it was used.

    `source_type` is the digital source type that it has in its metadata, of IPTC's terms the last part; `missing`
    says what cannot be taken over from it. A learned file has no media type.
    """

    name: str
    sha256: str
    uses: tuple[str, ...] = ()
    media_type: str = ""
    source_type: str = ""
    missing: str = ""

    def describe(self) -> str:
        """Uses, SHA-256 and claims in one line."""
        parts = [", ".join(self.uses), f"SHA-256 {self.sha256}"]
        parts += [f"labelled {self.source_type}"] if self.source_type else []
        return "; ".join(part for part in (*parts, self.missing) if part)


def trace(prompt: Mapping[str, Any], last: str) -> Trace:
    """What led to the node `last` of an API-format prompt; nothing where the prompt does not have it.

    Consent records are left out. Each input of one of the pack's nodes is a use: what reaches it is used as that, and
    no longer as what comes after it.
    """
    if last not in prompt:
        return Trace()
    links: dict[str, list[tuple[str, str]]] = {}
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node not in links:
            links[node] = [
                (name, link[0]) for name, link in _inputs(prompt, node)
                if _is_link(prompt, link) and _class(prompt, link[0]) != _CONSENT
            ]
            waiting += [source for _, source in links[node]]
    order = list(graphlib.TopologicalSorter({
        node: {source for _, source in sources} for node, sources in links.items()
    }).static_order())
    uses: dict[str, set[str]] = {node: set() for node in order}
    shown = {last}
    for node in reversed(order):
        ours = node != last and _class(prompt, node).startswith(_OURS)
        for name, source in links[node]:
            uses[source] |= {f"{name} of {_class(prompt, node)}"} if ours else uses[node]
            if node in shown and _PICTURE.fullmatch(name):
                shown.add(source)
    before = [node for node in order if node != last]
    found: dict[str, tuple[set[str], set[str]]] = {}
    folders: set[str] = set()
    for node in before:
        for name, value in _inputs(prompt, node):
            for text in () if _is_link(prompt, value) else _texts(value):
                inputs, used = found.setdefault(text, (set(), set()))
                inputs.add(f"{name} of {_class(prompt, node)}")
                used |= uses[node]
                folders |= {text} if name in _FOLDERS else set()
    marks = [title for node in before if node in shown and _WATERMARK.search(title := _title(prompt, node))]
    return Trace(
        steps=tuple(
            Step(_class(prompt, node), _settings(prompt, node))
            for node in before if _class(prompt, node).startswith(_OURS)
        ),
        texts={text: Text(*(tuple(sorted(part)) for part in parts)) for text, parts in found.items()},
        folders=tuple(sorted(folders)),
        watermarks=tuple(title for title in marks if not _REMOVING.search(title) and not _READING.search(title)),
        removers=tuple(title for title in marks if _REMOVING.search(title)),
    )


def manifest(
    title: str, label: str, traced: Trace, count: int, when: str, consent: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The definition of a manifest with `count` ingredients, as c2pa's Builder reads it; `when` is in ISO 8601."""
    created = {
        "action": "c2pa.created", "when": when, "digitalSourceType": SOURCE_TYPES + label,
        "softwareAgent": {"name": GENERATOR},
    }
    if count:
        created["parameters"] = {"ingredientIds": [ingredient_id(index) for index in range(count)]}
    methods = [
        {
            "action": f"{VENDOR}.method", "softwareAgent": {"name": step.class_type},
            "parameters": {"settings": storable(step.settings)},
        }
        for step in traced.steps
    ]
    marks = [{"action": "c2pa.watermarked.unbound", "softwareAgent": {"name": name}} for name in traced.watermarks]
    assertions = [{"label": "c2pa.actions.v2", "data": {"actions": [created, *methods, *marks]}}]
    if consent:
        assertions.append({"label": f"{VENDOR}.consent", "data": storable(consent)})
    return {"claim_generator_info": [{"name": GENERATOR}], "title": title, "assertions": assertions}


def ingredient(index: int, each: Ingredient) -> dict[str, Any]:
    """The definition of an ingredient: something to work from, which is neither edited nor a part of the result."""
    learned = {} if each.media_type else {"instance_id": f"sha256:{each.sha256}"}
    return {
        "label": ingredient_id(index), "title": storable(each.name), "relationship": "inputTo",
        "description": storable(each.describe()), **learned,
    }


def ingredient_id(index: int) -> str:
    """The name by which actions know an ingredient."""
    return f"ingredient-{index}"


def storable(value: Any) -> Any:
    """`value` with what a manifest cannot hold, such as NaN, or a whole number over 63 bits, as text."""
    if isinstance(value, Mapping):
        return {str(key): storable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [storable(part) for part in value]
    if isinstance(value, bool | None):
        return value
    if isinstance(value, int):
        return value if abs(value) <= _LARGEST else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value).encode(errors="replace").decode()


def _inputs(prompt: Mapping[str, Any], node: str) -> list[tuple[str, Any]]:
    return list(prompt[node].get("inputs", {}).items())


def _class(prompt: Mapping[str, Any], node: str) -> str:
    return str(prompt[node].get("class_type", ""))


def _title(prompt: Mapping[str, Any], node: str) -> str:
    """The class and, where it has another one, the title that the user sees."""
    title = str(prompt[node].get("_meta", {}).get("title", ""))
    return f"{_class(prompt, node)} ({title})" if title else _class(prompt, node)


def _is_link(prompt: Mapping[str, Any], value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in prompt


def _settings(prompt: Mapping[str, Any], node: str) -> dict[str, Any]:
    """The values of a node's widgets; of what comes through a link, that of a node that has only one."""
    settings = {}
    for name, value in _inputs(prompt, node):
        if _is_link(prompt, value):
            values = [part for _, part in _inputs(prompt, value[0]) if not _is_link(prompt, part)]
            if len(values) != 1 or len(_inputs(prompt, value[0])) != 1:
                continue
            value = values[0]
        settings[name] = value
    return settings


def _texts(value: Any) -> Iterator[str]:
    """The texts in a widget's value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
