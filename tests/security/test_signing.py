"""Signatures, `dlp-edge sign` and `dlp-edge verify`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dlp_edge import BundleError, Runtime, UsageError
from dlp_edge.bundle.signing import SIGNATURE, TrustedKey, write_new_key
from dlp_edge.bundle.verify import sign_bundle, verify_bundle
from dlp_edge.cli.main import main

pytest.importorskip("cryptography")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    write_new_key(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def public(key: Path) -> Path:
    return key.with_name("key.pub")


@pytest.fixture
def signed(bundle_copy: Path, key: Path) -> Path:
    sign_bundle(bundle_copy, key)
    return bundle_copy


def test_a_signed_bundle_is_good_and_an_unsigned_one_is_whole(
    signed: Path, public: Path, tiny_bundle: Path
) -> None:
    assert verify_bundle(signed, TrustedKey(public)).signature == "good"
    assert verify_bundle(signed).signature == "present"
    assert verify_bundle(tiny_bundle).signature == "none"
    with pytest.raises(BundleError, match="not signed"):
        verify_bundle(tiny_bundle, TrustedKey(public))


@pytest.mark.parametrize("form", ["path", "text", "pem", "raw"])
def test_a_runtime_that_trusts_one_key(signed: Path, public: Path, form: str) -> None:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    pem = public.read_bytes()
    raw = load_pem_public_key(pem).public_bytes_raw()  # type: ignore[union-attr]
    keys: dict[str, str | Path | bytes] = {
        "path": public,
        "text": str(public),
        "pem": pem,
        "raw": raw,
    }
    with Runtime(signed, trusted_key=keys[form]) as runtime:
        assert runtime.generate("Hello", adapters={}, max_new_tokens=2).text
    with Runtime(signed) as runtime:  # who trusts all takes it too
        assert runtime.adapters


def other_signature(folder: Path) -> bytes:
    write_new_key(folder.parent / "other")
    sign_bundle(folder, folder.parent / "other")
    return (folder / SIGNATURE).read_bytes()


FORGERIES: dict[str, Callable[[Path], object]] = {
    "another key": lambda folder: other_signature(folder),
    "none": lambda folder: (folder / SIGNATURE).unlink(),
    "empty": lambda folder: (folder / SIGNATURE).write_bytes(b""),
    "zeros": lambda folder: (folder / SIGNATURE).write_bytes(bytes(64)),
    "longer": lambda folder: (folder / SIGNATURE).write_bytes(
        (folder / SIGNATURE).read_bytes() + b"\n"
    ),
    "huge": lambda folder: (folder / SIGNATURE).write_bytes(bytes(10_000_000)),
    "a folder": lambda folder: ((folder / SIGNATURE).unlink(), (folder / SIGNATURE).mkdir()),
    "manifest with a space more": lambda folder: (folder / "manifest.json").write_bytes(
        (folder / "manifest.json").read_bytes() + b" "
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_signatures(signed: Path, public: Path, forgery: str) -> None:
    FORGERIES[forgery](signed)
    with pytest.raises(BundleError):
        Runtime(signed, trusted_key=public)
    assert main(["verify", str(signed), "--key", str(public)]) == 3


def test_every_bit_of_the_signature_counts(signed: Path, public: Path) -> None:
    trusted, manifest = TrustedKey(public), (signed / "manifest.json").read_bytes()
    signature = (signed / SIGNATURE).read_bytes()
    trusted.check(manifest, signature)
    for bit in range(512):
        changed = bytearray(signature)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BundleError):
            trusted.check(manifest, bytes(changed))


def test_a_signed_bundle_with_another_file_is_refused(signed: Path, public: Path) -> None:
    """The hash is in the signed manifest."""
    path = signed / "adapters.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="adapters"):
        Runtime(signed, trusted_key=public)


def test_the_bytes_that_were_verified_are_those_that_are_used(
    signed: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is replaced right after its signature was checked."""
    check = TrustedKey.check

    def check_then_replace(self: TrustedKey, manifest: bytes, signature: bytes | None) -> None:
        check(self, manifest, signature)
        (signed / "manifest.json").write_text("{}")

    monkeypatch.setattr(TrustedKey, "check", check_then_replace)
    with Runtime(signed, trusted_key=public) as runtime:
        assert len(runtime.adapters) == 3


def test_a_change_ends_the_signature(
    signed: Path,
    public: Path,
    key: Path,
    parrot: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Runtime(signed, trusted_key=public) as runtime:
        for change in (
            lambda: runtime.remove_adapter("sql"),
            lambda: runtime.add_adapter("parrot", parrot),
        ):
            with pytest.raises(UsageError, match="signed bundles only"):
                change()
    verify_bundle(signed, TrustedKey(public))
    assert main(["add", str(signed), f"parrot={parrot}"]) == 0
    assert "sign it again" in capsys.readouterr().err
    assert not (signed / SIGNATURE).exists()
    sign_bundle(signed, key)
    assert main(["remove", str(signed), "parrot"]) == 0
    assert "sign it again" in capsys.readouterr().err
    assert verify_bundle(signed).signature == "none"


def test_a_damaged_bundle_is_not_signed(bundle_copy: Path, key: Path) -> None:
    (bundle_copy / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError):
        sign_bundle(bundle_copy, key)
    assert not (bundle_copy / SIGNATURE).exists()


def test_from_the_command_line(
    bundle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "mine"
    assert main(["sign", str(bundle_copy), "--new-key", str(key), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made == {
        "private_key": str(key),
        "public_key": f"{key}.pub",
        "signature": str(bundle_copy / SIGNATURE),
    }
    if os.name == "posix":
        assert key.stat().st_mode & 0o777 == 0o600
    assert main(["verify", str(bundle_copy), "--key", f"{key}.pub", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["signature"] == "good"
    assert found["bytes_per_second"] > 0
    assert main(["verify", str(bundle_copy)]) == 0
    assert "not checked" in capsys.readouterr().out
    assert main(["sign", str(bundle_copy), "--key", str(key)]) == 0
    assert "keep it secret" not in capsys.readouterr().out
    assert main(["sign", "--new-key", str(tmp_path / "two")]) == 0
    assert main(["verify", str(bundle_copy), "--key", str(tmp_path / "two.pub")]) == 3
    assert main(["sign", "--key", str(key)]) == 2
    assert main(["sign", "--new-key", str(key)]) == 2  # never overwritten
    assert main(["verify", str(bundle_copy), "--key", f"{key}.pub"]) == 0


def rsa_key() -> bytes:
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import rsa

    return (
        rsa.generate_private_key(65537, 2048)
        .public_key()
        .public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    )


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "not a PEM public key"),
        (b"x" * 100, "not a PEM public key"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "not a PEM public key"),
        (b"x" * 100_000, "too large"),
        (rsa_key, "not an Ed25519"),
    ],
)
def test_files_that_are_no_key(
    content: bytes | Callable[[], bytes], cause: str, tmp_path: Path, bundle_copy: Path
) -> None:
    (tmp_path / "k").write_bytes(content if isinstance(content, bytes) else content())
    with pytest.raises(UsageError, match=cause):
        TrustedKey(tmp_path / "k")
    with pytest.raises(UsageError):
        sign_bundle(bundle_copy, tmp_path / "k")


def test_keys_in_each_others_place(key: Path, public: Path, bundle_copy: Path) -> None:
    with pytest.raises(UsageError, match="private one"):
        TrustedKey(key)
    with pytest.raises(UsageError, match="not a PEM private key"):
        sign_bundle(bundle_copy, public)
    with pytest.raises(UsageError, match="cannot be read"):
        TrustedKey(key.parent / "missing")
    with pytest.raises(UsageError, match="Give a path"):
        TrustedKey(3)  # type: ignore[arg-type]


def test_a_key_with_a_passphrase_says_what_to_do(tmp_path: Path, bundle_copy: Path) -> None:
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    (tmp_path / "k").write_bytes(
        Ed25519PrivateKey.generate().private_bytes(
            forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.BestAvailableEncryption(b"secret")
        )
    )
    with pytest.raises(UsageError, match="passphrase"):
        sign_bundle(bundle_copy, tmp_path / "k")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_makes_keys_and_checks_signatures(bundle_copy: Path, tmp_path: Path) -> None:
    def openssl(*words: str | Path) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True)

    openssl("genpkey", "-algorithm", "ed25519", "-out", tmp_path / "k.pem")
    openssl("pkey", "-in", tmp_path / "k.pem", "-pubout", "-out", tmp_path / "k.pub")
    sign_bundle(bundle_copy, tmp_path / "k.pem")
    assert verify_bundle(bundle_copy, TrustedKey(tmp_path / "k.pub")).signature == "good"
    openssl(
        *("pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", tmp_path / "k.pub"),
        *("-in", bundle_copy / "manifest.json", "-sigfile", bundle_copy / SIGNATURE),
    )


def test_without_the_package_the_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from dlp_edge.bundle.signing import TrustedKey\n"
        "try:\n    TrustedKey(bytes(32))\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("UsageError")
    assert "dlp-edge[sign]" in done.stdout
