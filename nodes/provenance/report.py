"""What a manifest claims and what holds of that, in words, from c2pa's report; whoever only reads needs no more."""

from __future__ import annotations

import dataclasses
import itertools
import json
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from .config import SOURCE_TYPES, VENDOR

# Failures that do not touch what the signature binds: nobody vouches for the signer; the picture is told separately.
_UNKNOWN_SIGNER = "signingCredential.untrusted"
_PICTURE = ("assertion.dataHash", "assertion.bmffHash", "assertion.boxesHash")
_LONGEST_VALUE = 300  # characters
_MOST_LINES = 400
_DEEPEST = 8  # ingredients of ingredients
_JOINERS = "\u200c\u200d"  # spelling in Persian, Indic scripts and emoji


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether the active manifest is as it was signed, whether the picture is, and whether somebody vouches for the
    signer; and what is wrong, in c2pa's words.
    """

    signature_holds: bool
    picture_matches: bool
    is_trusted: bool
    problems: tuple[str, ...] = ()


def verdict(results: Mapping[str, Any]) -> Verdict:
    """What c2pa's validation results of one manifest, and of what has changed in its ingredients since, come to.

    The picture matches only where the hash that it matches is itself signed: a forger can compute a new one.
    """
    active = results.get("activeManifest") or {}
    success, failure = _codes(active, "success"), _codes(active, "failure")
    for delta in results.get("ingredientDeltas") or []:
        failure += _codes(delta.get("validationDeltas") or {}, "failure")
    broken = [
        (code, url, words) for code, url, words in failure
        if code != _UNKNOWN_SIGNER and not code.startswith(_PICTURE)
    ]
    signed = any(code == "claimSignature.validated" for code, _, _ in success)
    bound = {url for code, url, _ in success if code == "assertion.hashedURI.match"}
    hashes = {url for code, url, _ in success if code in {f"{name}.match" for name in _PICTURE}}
    unlike = any(code.startswith(_PICTURE) for code, _, _ in failure)
    valid = signed and not any(code.startswith(("claimSignature", "signingCredential")) for code, _, _ in broken)
    return Verdict(
        signature_holds=signed and not broken,
        picture_matches=valid and bool(hashes & bound) and not unlike,
        is_trusted=any(code == "signingCredential.trusted" for code, _, _ in success),
        problems=tuple(plain(words) for code, _, words in failure if code != _UNKNOWN_SIGNER),
    )


def describe(report: Mapping[str, Any]) -> tuple[Verdict, list[str]]:
    """The verdict on the active manifest, and lines that say all that it and its ingredients claim."""
    manifests = report.get("manifests") or {}
    active = str(report.get("active_manifest") or "")
    judged = verdict(report.get("validation_results") or {})
    picture = "unchanged since it was signed" if judged.picture_matches else "NOT proved to be what was signed"
    head = [f"Signature: {_signature(judged)}", f"Picture: {picture}"]
    problems = [f"Problem: {problem}" for problem in judged.problems]
    # No more than is shown: manifests that share ingredients would be told again and again.
    lines = [*itertools.islice(itertools.chain(head, problems, _manifest(manifests, active, 0, ())), _MOST_LINES + 1)]
    return judged, lines if len(lines) <= _MOST_LINES else [*lines[:-1], "… and more"]


def _signature(judged: Verdict) -> str:
    if not judged.signature_holds:
        return "does NOT hold: what follows may be forged"
    if judged.is_trusted:
        return "holds, by a signer whom an authority vouches for that you trust"
    return "holds, but nobody that you trust vouches for the signer: anyone can make a certificate in any name"


def _manifest(manifests: Mapping[str, Any], label: str, depth: int, above: tuple[str, ...]) -> Iterator[str]:
    """The lines on one manifest and what it was made from."""
    indent = "  " * depth
    content = manifests.get(label)
    if not isinstance(content, Mapping) or label in above or depth > _DEEPEST:
        yield f"{indent}(a manifest that is not there, or refers to itself)"
        return
    signer = content.get("signature_info") or {}
    yield f"{indent}Signed by: {_join(signer.get('common_name'), signer.get('issuer'))}"
    if signer.get("time"):
        yield f"{indent}Signed at: {plain(signer['time'])}"
    makers = content.get("claim_generator_info") or []
    yield f"{indent}Made with: {'; '.join(_join(each.get('name'), each.get('version')) for each in makers)}"
    if content.get("title"):
        yield f"{indent}Title: {plain(content['title'])}"
    for assertion in content.get("assertions") or []:
        yield from (f"{indent}{line}" for line in _assertion(assertion))
    for each in content.get("ingredients") or []:
        words = "; ".join(plain(each[key]) for key in ("relationship", "description") if each.get(key))
        yield f"{indent}From: {plain(each.get('title', 'a file without a name'))} ({words})"
        results = each.get("validation_results") or {}
        if each.get("active_manifest"):
            judged = verdict(results)
            picture = "its picture was unchanged" if judged.picture_matches else "its picture was NOT what was signed"
            yield f"{indent}  When it was used, its signature {_signature(judged).split(':')[0]}; {picture}"
            yield from _manifest(manifests, str(each["active_manifest"]), depth + 1, (*above, label))
        else:
            yield from (f"{indent}  {plain(words)}: {plain(url)}" for _, url, words in _codes(
                results.get("activeManifest") or {}, "failure"
            ))


def _assertion(assertion: Mapping[str, Any]) -> Iterator[str]:
    """The lines on one assertion: one for each action, one for any other."""
    label, data = str(assertion.get("label", "")), assertion.get("data")
    if not label.startswith("c2pa.actions") or not isinstance(data, Mapping):
        name = "Consent" if label == f"{VENDOR}.consent" else f"States {plain(label)}"
        yield f"{name}: {plain(json.dumps(data, ensure_ascii=False))}"
        return
    actions = data.get("actions")
    for action in actions if isinstance(actions, list) else [actions]:
        if not isinstance(action, Mapping):  # of an assertion whose form c2pa does not know
            yield f"Action {plain(action)}"
            continue
        agent, settings = action.get("softwareAgent"), action.get("parameters")
        agent = agent.get("name") if isinstance(agent, Mapping) else agent
        settings = settings.get("settings") if isinstance(settings, Mapping) else None
        parts = [
            str(action.get("digitalSourceType", "")).removeprefix(SOURCE_TYPES), agent, action.get("when"),
            json.dumps(settings, ensure_ascii=False) if settings else "",
        ]
        name = str(action.get("action", "")).removeprefix(f"{VENDOR}.")
        yield f"Action {plain(name)}: {', '.join(plain(part) for part in parts if part)}"


def plain(value: Any) -> str:
    """A text from a file as one short line, without what steers a screen."""
    text = str(value)
    cut = "…" if len(text) > _LONGEST_VALUE else ""
    visible = (
        c if c in _JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else " "
        for c in text[:_LONGEST_VALUE]
    )
    return " ".join("".join(visible).split()) + cut


def _join(*parts: Any) -> str:
    return ", ".join(plain(part) for part in parts if part) or "nobody named"


def _codes(results: Mapping[str, Any], kind: str) -> list[tuple[str, str, str]]:
    """(code, url, words) of each result of a kind."""
    return [
        (str(each.get("code", "")), str(each.get("url", "")), str(each.get("explanation", each.get("code", ""))))
        for each in results.get(kind) or []
    ]
