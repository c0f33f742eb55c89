"""The command's certificates, and what is said of wrong ones."""

import datetime
import os
import stat
import sys

import make_certificate
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from pack.nodes.provenance import nodes, signing
from support import labels

from .conftest import NOW


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(nodes, "tell", lambda _node, some, *_level: lines.extend(some))
    return lines


def test_the_command_s_certificate_signs_and_its_authority_is_trusted(folders, certificate):
    (path,) = labels.label(folders)
    anchors = (certificate / "trusted.pem").read_text()
    assert labels.manifests(path)[1]["validation_state"] == "Valid"
    active, report = labels.manifests(path, anchors)
    assert report["validation_state"] == "Trusted" and active["signature_info"]["common_name"] == "Anna"


def test_the_command_replaces_nothing_and_keeps_the_key_private(certificate):
    key = certificate / "private_key.pem"
    before = key.read_bytes()
    with pytest.raises(FileExistsError, match="certificate.pem is there already: move it away"):
        make_certificate.write(make_certificate.make("B", 1, NOW), certificate)
    assert key.read_bytes() == before
    assert os.name == "nt" or stat.S_IMODE(key.stat().st_mode) == 0o600


def test_the_command_says_where_the_files_are_and_what_they_are_not_worth(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_certificate.environment, "enter", lambda _root: None)
    monkeypatch.setattr(sys, "argv", ["make_certificate.py", "Åsa", "--folder", str(tmp_path / "new")])
    assert make_certificate.main() == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "new") in said and "nobody has checked the name" in said
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(make_certificate.FILES)
    assert make_certificate.main() == 1 and "is there already" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["make_certificate.py", "x" * 65])
    with pytest.raises(SystemExit):
        make_certificate.main()


def test_without_certificate_the_label_is_written_and_the_node_says_so(folders, told):
    (path,) = labels.label(folders)
    assert labels.COMPOSITE.encode() in labels.packet(path)
    assert any("holds no certificate, so there is a label and no signature" in line for line in told)


def test_without_the_library_the_label_is_written_and_the_node_says_so(folders, certificate, told, monkeypatch):
    monkeypatch.setattr(signing, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "c2pa", None)
    (path,) = labels.label(folders)
    assert labels.COMPOSITE.encode() in labels.packet(path)
    assert any("pip install c2pa-python" in line for line in told)


def pem(part):
    return part.public_bytes(serialization.Encoding.PEM)


def key_pem(key):
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def simple_certificate(key, issuer="other"):
    """A certificate that C2PA does not take: by itself or by nobody, without the extensions that it asks for."""
    called = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("me", issuer)]
    end = NOW + datetime.timedelta(days=3)
    return pem(x509.CertificateBuilder(*reversed(called), key.public_key(), 7, NOW, end).sign(key, hashes.SHA256()))


def wrong(kind):
    """The two files of a kind of mistake."""
    whole = make_certificate.make("Anna", 30, NOW)
    chain, key = whole["certificate.pem"], whole["private_key.pem"]
    mark = b"-----BEGIN CERTIFICATE-----"
    own = ec.generate_private_key(ec.SECP256R1())
    first, second = (mark + part for part in chain.split(mark)[1:])
    then = NOW - datetime.timedelta(days=60)
    return {
        "no key": (chain, None), "no chain": (None, key), "text": (b"hello", key), "text key": (chain, b"hello"),
        "order": (second + first, key), "other key": (chain, make_certificate.make("B", 1, NOW)["private_key.pem"]),
        "self-signed": (simple_certificate(own, "me"), key_pem(own)),
        "expired": tuple(list(make_certificate.make("Anna", 30, then).values())[:2]),
        "early": tuple(list(make_certificate.make("Anna", 30, NOW + datetime.timedelta(days=9)).values())[:2]),
        "purpose": (simple_certificate(own), key_pem(own)),
        "curve": (simple_certificate(k1 := ec.generate_private_key(ec.SECP256K1())), key_pem(k1)),
        "password": (chain, serialization.load_pem_private_key(key, None).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )),
    }[kind]


@pytest.mark.parametrize(("kind", "message"), [
    ("no key", "private_key.pem is missing: put it beside"),
    ("no chain", "certificate.pem is missing: put it beside"),
    ("text", "certificate.pem holds no certificates in PEM form: use another; .* makes one for trials"),
    ("text key", "private_key.pem is no private key"), ("password", "private_key.pem is no private key .* password"),
    ("order", "does not belong to the first certificate .* begin certificate.pem with the signer's"),
    ("other key", "does not belong to the first certificate"),
    ("self-signed", "is self-signed, which C2PA does not allow: use another; .*make_certificate.py"),
    ("expired", "is valid from .* only: use another"), ("early", "is valid from .* only: use another"),
    ("purpose", "C2PA refuses to sign .* must be one for signing"),
    ("curve", "use P-256, P-384, P-521, RSA or Ed25519"),
])
def test_a_wrong_certificate_is_an_error_that_names_the_fix(folders, kind, message):
    signing.folder().mkdir(parents=True)
    for name, content in zip(("certificate.pem", "private_key.pem"), wrong(kind), strict=True):
        if content is not None:
            (signing.folder() / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        labels.label(folders)
    assert list(folders.output.rglob("*.png")) == []
    assert labels.label(folders, sign=False)  # nothing is looked at


@pytest.mark.parametrize("key", [
    ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048),
], ids=["P-384", "RSA"])
def test_other_kinds_of_keys_are_named_as_c2pa_does(key, tmp_path):
    assert signing._algorithm(tmp_path, key) in ("es384", "ps256")


def test_a_changed_source_is_signed_again(folders):
    (folders.input / "a.png").write_bytes(b"1")
    before = labels.UnderstudyLabelMedia.fingerprint_inputs(sources="a.png\n")
    (folders.input / "a.png").write_bytes(b"2")
    assert labels.UnderstudyLabelMedia.fingerprint_inputs(sources="a.png\n") != before
    assert labels.UnderstudyLabelMedia.fingerprint_inputs(sources="none.png") == ""


def test_a_new_certificate_signs_again(folders, certificate):
    before = labels.UnderstudyLabelMedia.fingerprint_inputs()
    for name in make_certificate.FILES:
        (certificate / name).unlink()
    without = labels.UnderstudyLabelMedia.fingerprint_inputs()
    make_certificate.write(make_certificate.make("Anna", 30, NOW), certificate)
    assert len({before, without, labels.UnderstudyLabelMedia.fingerprint_inputs()}) == 3
