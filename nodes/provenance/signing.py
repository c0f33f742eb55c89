"""Signed manifests by c2pa-python, if it is there: what signs, signing and reading, without any connection."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths

from .config import PURPOSES, VENDOR
from .files import has_manifest

CERTIFICATE, KEY, TRUSTED = "certificate.pem", "private_key.pem", "trusted.pem"
INSTALL = "install it with `pip install c2pa-python`"
MAKE = "`python workflows/make_certificate.py` makes one for trials"

_OPAQUE = "application/octet-stream"  # a format in which c2pa looks for nothing
ELSEWHERE = "its manifest is kept elsewhere"
_REMOTE = "Remote"  # begins c2pa's error where a file only has the address of its manifest
# Every switch of the library that would open a connection.
_OFFLINE = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "core": {"allowed_network_hosts": [], "allow_redirects": False},
}
# What the signer answers for; other assertions would count as gathered from elsewhere (C2PA 2.2).
_OURS = ["c2pa.actions", "c2pa.ingredient", f"{VENDOR}.consent"]


@dataclasses.dataclass(frozen=True, repr=False)
class Credentials:
    """What signs: the algorithm, the chain of certificates and the private key, both as PEM."""

    algorithm: str
    chain: bytes
    key: bytes
    signer: str


def folder() -> Path:
    """Where certificates are: of ComfyUI's user folders one that its web server never serves."""
    return Path(folder_paths.get_system_user_directory("understudy"))


def is_available() -> bool:
    """Whether c2pa-python is installed."""
    return importlib.util.find_spec("c2pa") is not None


def credentials(now: datetime.datetime) -> Credentials | None:
    """What is in the folder, or None. Raises ValueError, naming the file and the fix, for what C2PA would refuse."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    paths = certificate, key = folder() / CERTIFICATE, folder() / KEY
    missing = [path for path in paths if not path.is_file()]
    if len(missing) == len(paths):
        return None
    if missing:
        raise ValueError(f"{missing[0]} is missing: put it beside the other file, or remove both to label unsigned")
    try:
        chain = x509.load_pem_x509_certificates(certificate.read_bytes())
    except ValueError as error:
        raise _refused(certificate, "holds no certificates in PEM form") from error
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise _refused(key, "is no private key in PEM form without a password") from error
    signer = chain[0]
    if _public(signer.public_key()) != _public(private.public_key()):
        fix = f"begin {CERTIFICATE} with the signer's certificate, its authorities below it"
        raise ValueError(f"{key} does not belong to the first certificate of {certificate}: {fix}")
    if signer.issuer == signer.subject:
        raise _refused(certificate, "is self-signed, which C2PA does not allow")
    if not signer.not_valid_before_utc <= now <= signer.not_valid_after_utc:
        days = f"{signer.not_valid_before_utc:%Y-%m-%d} to {signer.not_valid_after_utc:%Y-%m-%d}"
        raise _refused(certificate, f"is valid from {days} only")
    return Credentials(
        _algorithm(certificate, private), b"".join(each.public_bytes(serialization.Encoding.PEM) for each in chain),
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        _name(signer),
    )


def sign(
    content: bytes, media_type: str, definition: Mapping[str, Any], signer: Credentials,
    ingredients: Sequence[tuple[Mapping[str, Any], str, Path | None]],
) -> bytes:
    """The file with a signed manifest, which binds every byte of it.

    `ingredients` are (definition, media type, path): those with a path are added with their bytes, so that manifests
    in them become part of this one. Raises ValueError where C2PA refuses to sign.
    """
    import c2pa

    # No authority for time stamps: it is a server.
    info = c2pa.C2paSignerInfo(signer.algorithm, signer.chain, signer.key, None)
    signed = io.BytesIO()
    try:
        with (
            _context() as context, c2pa.Signer.from_info(info) as key,
            c2pa.Builder(dict(definition), context=context) as builder,
        ):
            for each, kind, path in ingredients:
                with open(path, "rb") if path else io.BytesIO() as file:
                    builder.add_ingredient(dict(each), kind if path else _OPAQUE, file)
            builder.sign(key, media_type, io.BytesIO(content), signed)
    except c2pa.C2paError as error:
        fix = f"check {folder() / CERTIFICATE}: its first certificate must be one for signing, as C2PA asks; {MAKE}"
        raise ValueError(f"C2PA refuses to sign ({_line(error)}): {fix}") from error
    return signed.getvalue()


def read(path: str | os.PathLike) -> tuple[dict[str, Any] | None, str]:
    """c2pa's report on the manifests of a file, or None, and why there is none although the file has or names one.

    Raises ValueError for a file of trusted certificates that cannot be read.
    """
    import c2pa

    try:
        with _context() as context, open(path, "rb") as file, c2pa.Reader(file, context=context) as reader:
            return json.loads(reader.json()), ""
    except (c2pa.C2paError.ManifestNotFound, c2pa.C2paError.NotSupported):
        problem = ""
    except c2pa.C2paError as error:
        problem = _line(error)
    if problem.startswith(_REMOTE):
        return None, f"{ELSEWHERE}, and no connection is opened: {problem.partition(' url ')[2]}"
    what = "its manifest cannot be read" if has_manifest(path) else "C2PA cannot read it"
    return None, f"{what} ({problem})" if problem else ""


def _context() -> Any:
    """c2pa's settings for one use: offline, with the authorities that the user trusts."""
    import c2pa

    builder = {"thumbnail": {"enabled": False}, "created_assertion_labels": _OURS}
    trust = {"trust_config": "\n".join(PURPOSES)}
    trusted = folder() / TRUSTED
    if trusted.is_file():
        trust["trust_anchors"] = trusted.read_text(encoding="utf-8", errors="replace")
    try:
        return c2pa.Context.from_dict({**_OFFLINE, "trust": trust, "builder": builder})
    except c2pa.C2paError as error:
        raise _refused(trusted, f"holds no certificates in PEM form ({_line(error)})") from error


def _algorithm(path: Path, key: Any) -> str:
    """C2PA's name of what a key signs with."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in curves:
        return curves[key.curve.name]
    if isinstance(key, rsa.RSAPrivateKey):
        return "ps256"
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    raise _refused(path, "has a kind of key that C2PA does not take: use P-256, P-384, P-521, RSA or Ed25519")


def _name(certificate: Any) -> str:
    from cryptography.x509.oid import NameOID

    names = [
        attribute.value for kind in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME)
        for attribute in certificate.subject.get_attributes_for_oid(kind)
    ]
    return str(names[0]) if names else "a signer without a name"


def _public(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _refused(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path} {problem}: use another; {MAKE}")
