"""Make a small test authority and a certificate with which Label Media signs.

    python workflows/make_certificate.py "Anna's studio"              for the ComfyUI that this pack is in
    python workflows/make_certificate.py "Anna's studio" --folder DIR   for another one: its user/__understudy

It writes certificate.pem, private_key.pem and trusted.pem, which lets Read Label on this machine trust the authority.
Without --folder, `run.py` signs with them as well.
What such a certificate is not worth: it says whatever name you typed, and nobody has checked it. Everybody else's
programs show its signer as unknown. It proves only that a file is as it was when the holder of the key signed it. For
more, ask an authority on C2PA's trust list for a certificate and put it in the same place.

The authority's own key is not kept, so it can sign nothing else. A trusted time stamp would need a server, so there
is none, and signatures hold until the certificate ends. Existing files are never replaced. Exit code: 0 if the files
were written, 2 for wrong arguments, 1 otherwise.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parent.parent
sys.path.append(str(ROOT / "workflows"))

from launcher import certificates, environment  # noqa: E402

FILES = certificates.FILES
MOST_DAYS = 3650


def make(name: str, days: int, now: datetime.datetime) -> dict[str, bytes]:
    """The files' contents: the signer's certificate with its authority's, the signer's key, and the authority's."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def called(common_name: str) -> x509.Name:
        organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test certificate, not checked by anybody")
        return x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])

    def started(subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder(issuer_name=called("Understudy test authority"), subject_name=subject)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
        builder = builder.not_valid_after(now + datetime.timedelta(days=days))
        return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)

    def allowed(**uses: bool) -> x509.KeyUsage:
        every = (
            "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
            "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
        )
        return x509.KeyUsage(**{use: uses.get(use, False) for use in every})

    above, below = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = (
        started(called("Understudy test authority"), above)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(allowed(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(above, hashes.SHA256())
    )
    # C2PA's profile of certificates: an authority's identifier, a purpose, and no right to certify others.
    signer = (
        started(called(name), below)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(allowed(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(above.public_key()), critical=False)
        .sign(above, hashes.SHA256())
    )
    chain = [each.public_bytes(serialization.Encoding.PEM) for each in (signer, authority)]
    key = below.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return dict(zip(FILES, (b"".join(chain), key, chain[1]), strict=True))


def write(contents: dict[str, bytes], folder: Path) -> None:
    """Write the files, the key for its owner's eyes only. Raises FileExistsError, leaving all as it was."""
    for name in contents:
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} is there already: move it away, or choose another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        mode = 0o600 if name == "private_key.pem" else 0o644
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="the signer's name, which everybody can read in what it signs")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the three files go")
    parser.add_argument("--days", type=int, default=365, help="how long signatures hold (default: 365)")
    options = parser.parse_args()
    if not 1 <= options.days <= MOST_DAYS:
        parser.error(f"--days is {options.days}: use 1 to {MOST_DAYS}")
    if not 1 <= len(options.name) <= 64:
        parser.error(f"the name has {len(options.name)} characters: use 1 to 64, as certificates do")
    environment.enter(ROOT)
    folder = options.folder or certificates.folder(ROOT)
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    try:
        write(make(options.name, options.days, now), folder)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Wrote {', '.join(FILES)} to {folder}. Label Media signs with them from now on, for {options.days} days.")
    print("It is a test certificate: nobody has checked the name, so others' programs show the signer as unknown.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
