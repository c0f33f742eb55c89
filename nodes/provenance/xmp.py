"""XMP packets, a format that no library here writes: the label and what a result was made from, in plain metadata."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree

from .config import GENERATOR, SOURCE_TYPES
from .method import Ingredient

MAX_PACKET = 1 << 20  # bytes; those of cameras and editors have a few thousand
BOX = uuid.UUID("BE7ACFCB-97A9-42E8-9C71-999491E3AFAC").bytes  # of a packet in MP4: XMP specification, part 3, 1.2.8

_META = "adobe:ns:meta/"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_XMP = "http://ns.adobe.com/xap/1.0/"
_MEDIA = "http://ns.adobe.com/xap/1.0/mm/"
_REFERENCE = "http://ns.adobe.com/xap/1.0/sType/ResourceRef#"
_UNDERSTUDY = "https://github.com/understudy/ComfyUI-Understudy/ns/1.0/"
_PREFIXES = {
    "x": _META, "rdf": _RDF, "Iptc4xmpExt": _IPTC, "xmp": _XMP, "xmpMM": _MEDIA, "stRef": _REFERENCE,
    "understudy": _UNDERSTUDY,
}
_SOURCE_TYPE = f"{{{_IPTC}}}DigitalSourceType"
_TERM = re.compile(f"^{re.escape(SOURCE_TYPES).replace('http:', 'https?:')}|/$")  # what is not told of IPTC's terms


def write(label: str, ingredients: Sequence[Ingredient], consent: str = "") -> bytes:
    """A packet with the digital source type, and the ingredients by name, SHA-256 and their own source types."""
    for prefix, namespace in _PREFIXES.items():
        ElementTree.register_namespace(prefix, namespace)
    meta = ElementTree.Element(f"{{{_META}}}xmpmeta")
    about = {f"{{{_RDF}}}about": "", _SOURCE_TYPE: SOURCE_TYPES + label, f"{{{_XMP}}}CreatorTool": GENERATOR}
    if consent:
        about[f"{{{_UNDERSTUDY}}}Consent"] = _writable(consent)
    graph = ElementTree.SubElement(meta, f"{{{_RDF}}}RDF")
    description = ElementTree.SubElement(graph, f"{{{_RDF}}}Description", about)
    if ingredients:
        listed = ElementTree.SubElement(description, f"{{{_MEDIA}}}Ingredients")
        bag = ElementTree.SubElement(listed, f"{{{_RDF}}}Bag")
        for each in ingredients:
            item = ElementTree.SubElement(bag, f"{{{_RDF}}}li", {f"{{{_RDF}}}parseType": "Resource"})
            ElementTree.SubElement(item, f"{{{_REFERENCE}}}filePath").text = _writable(each.name)
            ElementTree.SubElement(item, f"{{{_UNDERSTUDY}}}Description").text = _writable(each.describe())
            if each.source_type:
                vocabulary = "" if ":" in each.source_type else SOURCE_TYPES
                ElementTree.SubElement(item, _SOURCE_TYPE).text = vocabulary + _writable(each.source_type)
    content = ElementTree.tostring(meta, encoding="unicode")
    packet = f'<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n{content}\n<?xpacket end="w"?>'
    return packet.encode()


def source_type(packet: bytes) -> str:
    """The file's digital source type: the last part of IPTC's terms, such as `trainedAlgorithmicMedia`, any other as
    it is; empty where it has none.

    Raises ValueError for several, for what is no XMP packet, or one that is over MAX_PACKET or defines entities.
    """
    if len(packet) > MAX_PACKET:
        raise ValueError(f"its XMP metadata has {len(packet)} bytes, over the {MAX_PACKET} that are read")
    try:
        text = packet.decode().strip("\ufeff\0 \n\r\t")
        if "<!" in text:  # a document type, whose entities could grow without bounds
            raise ValueError("it defines a document type")
        tree = ElementTree.fromstring(text)
    except (ValueError, ElementTree.ParseError) as error:
        raise ValueError(f"its XMP metadata is not valid ({error})") from error
    descriptions = tree.iterfind(f".//{{{_RDF}}}RDF/{{{_RDF}}}Description")
    found = {_TERM.sub("", value) for description in descriptions for value in _values(description) if value}
    if len(found) > 1:
        raise ValueError(f"it names several digital source types: {', '.join(sorted(found))}")
    return min(found, default="")


def _values(description: ElementTree.Element) -> Iterator[str]:
    """The forms in which XMP may state a simple property: an attribute, a text or a resource."""
    yield description.get(_SOURCE_TYPE, "")
    for element in description.iterfind(_SOURCE_TYPE):
        yield (element.text or "").strip() or element.get(f"{{{_RDF}}}resource", "")


def _writable(text: str) -> str:
    """`text` without the characters that XML cannot hold."""
    kept = (c if c >= " " and not "\ud800" <= c <= "\udfff" and c not in "\ufffe\uffff" else " " for c in text)
    return "".join(kept)
