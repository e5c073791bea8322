"""Certificates that verify, keys that Flower reads, and a clear line for everything that is wrong with them."""

from __future__ import annotations

import socket
import ssl
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.cli.supernode.register import try_load_public_key

from deploy import admission, credentials
from deploy.home import Home
from prfl import cli


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prfl", "deploy", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def shaken(home: Home, name: str) -> None:
    """A TLS handshake with the server's certificate, as strict as Python can be. Raises SSLError."""
    here, there = socket.socketpair()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(home.certificate, home.certificate_key)
    client = ssl.create_default_context(cafile=home.ca)
    client.verify_flags |= ssl.VERIFY_X509_STRICT

    def answer() -> None:
        try:
            server.wrap_socket(there, server_side=True).recv(1)
        except OSError:
            there.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        client.wrap_socket(here, server_hostname=name).close()
    finally:
        here.close()
        thread.join()


def ends(folder: Path, name: str, days: float) -> Path:
    """A certificate that ends in so many days."""
    key, subject = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 1)
        .not_valid_before(datetime.now(UTC) - timedelta(days=99))
        .not_valid_after(datetime.now(UTC) + timedelta(days=days))
        .sign(key, hashes.SHA256())
    )
    file = folder / name
    file.write_bytes(made.public_bytes(Encoding.PEM))
    return file


def test_certificates_verify_for_the_names_that_nodes_dial_and_no_other(tmp_path: Path) -> None:
    home = Home.of(tmp_path / "home")
    assert credentials.certify(home, ["fl.example.org", "192.0.2.7"]) == (
        "fl.example.org", "192.0.2.7", "localhost", "127.0.0.1",
    )  # fmt: skip
    for name in credentials.covered(home):
        shaken(home, name)
    with pytest.raises(ssl.SSLCertVerificationError):
        shaken(home, "example.org")
    assert {f.name: f.stat().st_mode & 0o777 for f in home.folder.iterdir()} == {
        "ca.crt": 0o644, "ca.key": 0o600, "server.crt": 0o644, "server.key": 0o600,
    }  # fmt: skip
    assert home.folder.stat().st_mode & 0o777 == 0o700


def test_a_renewed_certificate_keeps_the_ca_and_another_ca_does_not_verify_it(tmp_path: Path) -> None:
    home, other = Home.of(tmp_path / "home"), Home.of(tmp_path / "other")
    credentials.certify(home, ["fl.example.org"])
    before = {f: f.read_bytes() for f in home.folder.iterdir()}
    assert credentials.certify(home, [], days=5)[0] == "fl.example.org"
    changed = {f.name for f, content in before.items() if f.read_bytes() != content}
    assert changed == {"server.crt", "server.key"}
    shaken(home, "fl.example.org")
    credentials.certify(other, ["fl.example.org"])
    other.ca.write_bytes(home.ca.read_bytes())
    with pytest.raises(ssl.SSLCertVerificationError):
        shaken(other, "fl.example.org")
    with pytest.raises(ValueError, match=r"ca.key is not the key of .*ca.crt"):
        credentials.certify(other, ["fl.example.org"])
    other.ca_key.unlink()
    with pytest.raises(ValueError, match="only one of"):
        credentials.certify(other, ["fl.example.org"])


def test_what_ends_soon_is_said_and_what_has_ended_is_refused(tmp_path: Path) -> None:
    assert credentials.ending([ends(tmp_path, "ca.crt", 31)]) == []
    (line,) = credentials.ending([ends(tmp_path, "server.crt", 29), ends(tmp_path, "later.crt", 31)])
    assert "server.crt ends on " in line
    assert "prfl deploy certs" in line
    with pytest.raises(ValueError, match=r"ca.crt ended on .* copy ca.crt to every node"):
        credentials.ending([ends(tmp_path, "ca.crt", -1)])
    (tmp_path / "ca.crt").write_text("hello")
    with pytest.raises(ValueError, match="is not a certificate"):
        credentials.ending([tmp_path / "ca.crt"])


def test_keys_are_what_flower_reads_and_never_overwritten(tmp_path: Path) -> None:
    home = Home.of(tmp_path)
    public = credentials.make_key(home, "pi-1")
    assert credentials.public_key(public) == try_load_public_key(public)
    assert home.key("pi-1").stat().st_mode & 0o777 == 0o600
    credentials.check_key(home.key("pi-1"))
    before = home.key("pi-1").read_bytes()
    with pytest.raises(ValueError, match="never overwritten"):
        credentials.make_key(home, "pi-1")
    assert home.key("pi-1").read_bytes() == before
    home.key("pi-1").chmod(0o640)
    with pytest.raises(ValueError, match=r"can be read by others \(mode 640\); chmod 600"):
        credentials.check_key(home.key("pi-1"))


def test_admitting_twice_is_as_once_and_expelling_forgets(tmp_path: Path) -> None:
    server, device = Home.of(tmp_path / "server"), Home.of(tmp_path / "device")
    public = credentials.make_key(device, "pi")
    assert admission.admit(server, [public])[0] == "pi is admitted"
    assert admission.admit(server, [public])[0] == "pi is admitted already"
    assert credentials.admitted(server) == {"pi": credentials.public_key(public)}
    again = public.rename(public.with_name("again.pub"))
    with pytest.raises(ValueError, match="admitted as pi already"):
        admission.admit(server, [again])
    device.key("pi").unlink()
    with pytest.raises(ValueError, match="another key is admitted as pi"):
        admission.admit(server, [credentials.make_key(device, "pi")])
    admission.expel(server, "pi")
    assert credentials.admitted(server) == {}
    with pytest.raises(ValueError, match="no node pi is admitted; have none"):
        admission.expel(server, "pi")


def test_what_is_no_public_key_of_a_node_is_refused(tmp_path: Path) -> None:
    server, device = Home.of(tmp_path / "server"), Home.of(tmp_path / "device")
    credentials.make_key(device, "pi")
    other = ed25519.Ed25519PrivateKey.generate().public_key()
    (tmp_path / "other.pub").write_bytes(other.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    (tmp_path / "junk.pub").write_bytes(b"ecdsa-sha2-nistp384 AAAA" + bytes(20))
    for file, message in (
        (device.key("pi"), "is a private key"),
        (tmp_path / "other.pub", "is not an EC key"),
        (tmp_path / "junk.pub", "is not a public key"),
    ):
        with pytest.raises(ValueError, match=message):
            admission.admit(server, [file])
    assert not server.nodes.exists()


MISTAKES = {
    "an address with a port": (["certs", "host:9443"], "without port, got 'host:9443'"),
    "a broken address": (["certs", "300.1.1.1"], "got '300.1.1.1'"),
    "no name the first time": (["certs"], "no certificate in"),
    "a name that is a path": (["keys", "../x"], "got '../x'"),
    "a name that is ours": (["keys", "logs"], "got 'logs'"),
    "a file that is not there": (["admit", "nowhere.pub"], "nowhere.pub: No such file"),
    "a node nobody knows": (["expel", "pi"], "no node pi is admitted"),
    "a server without certificates": (["server"], "prfl deploy certs"),
    "no key named": (["node", "--server", "h:1", "--client", "0"], "--key NAME is missing"),
    "no ca.crt": (["node", "--server", "h:1", "--client", "0", "--key", "pi"], "ca.crt; copy it from the server"),
    "no port": (["node", "--server", "h:x", "--client", "0", "--key", "pi"], "an address is HOST:PORT, got 'h:x'"),
    "no folder": (
        ["node", "--server", "h:1", "--client", "0", "--key", "pi", "--own", "nowhere"],
        "nowhere is not a folder that can be read",
    ),
    "two folders": (
        ["node", "--server", "h:1", "--client", "0", "--key", "pi", "--own", ".", "--data", "."],
        "--data and --own exclude each other",
    ),
    "no run": (["status", "nowhere"], "nowhere holds no run"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRFL_HOME", str(tmp_path / "home"))
    arguments, message = MISTAKES[mistake]
    assert called(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("prfl: ")
    assert message in error


def test_a_node_looks_at_its_files_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Home.of(tmp_path)
    call = ("node", "--home", str(tmp_path), "--server", "h:1", "--client", "0", "--key", "pi")
    ends(tmp_path, "ca.crt", -1)
    assert called(monkeypatch, *call) == 2
    ends(tmp_path, "ca.crt", 20)
    assert called(monkeypatch, *call) == 2
    credentials.make_key(home, "pi")
    home.key("pi").chmod(0o644)
    assert called(monkeypatch, *call) == 2
    home.key("pi").write_text("hello")
    home.key("pi").chmod(0o600)
    assert called(monkeypatch, *call) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(
        any(word in line for line in lines) for word in ("ended on", "ends on", "no key", "by others", "not an EC")
    )
    assert len(lines) == 7  # three times the warning, four reasons


def test_the_commands_say_what_to_copy_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRFL_HOME", str(tmp_path / "home"))
    assert called(monkeypatch, "certs", "192.0.2.7") == 0
    assert f"scp {tmp_path / 'home' / 'ca.crt'} NODE:.prfl/ca.crt" in capsys.readouterr().out
    assert called(monkeypatch, "certs") == 0
    assert "the CA is as it was" in capsys.readouterr().out
    assert called(monkeypatch, "keys", "a", "b") == 0
    shown = capsys.readouterr().out
    assert [word in shown for word in ("prfl deploy admit a.pub", "prfl deploy admit b.pub")] == [True, True]
    assert called(monkeypatch, "admit", str(tmp_path / "home" / "a.pub")) == 0
    assert "it registers them when it starts" in capsys.readouterr().out
    assert called(monkeypatch, "status") == 0
    assert "no server runs on" in capsys.readouterr().out
