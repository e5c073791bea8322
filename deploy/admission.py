"""Which nodes may join: public keys in `nodes/`, and the SuperLink's registry kept equal to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from deploy.credentials import admitted, public_key
from deploy.home import Home, named, write
from deploy.internals import Registered, Registry, registry

EXPELLED = "unregistered"


def admit(home: Home, files: Sequence[Path]) -> list[str]:
    """Keep the keys, and register them when a server runs; a line for each. Raises ValueError before any is kept."""
    known, lines = admitted(home), []
    for file in files:
        name, key = named(file.stem), public_key(file)
        if known.get(name, key) != key:
            raise ValueError(
                f"another key is admitted as {name}; `prfl deploy expel {name}` first, or use another name"
            )
        if other := next((n for n, k in known.items() if k == key and n != name), None):
            raise ValueError(f"the key of {name} is admitted as {other} already")
        lines.append(f"{name} is admitted{' already' if name in known else ''}")
        known[name] = key
    fresh = {f.stem: f for f in files if not (home.nodes / f"{f.stem}.pub").exists()}
    if home.served():
        with connected(home) as found:
            expelled = {n.key for n in found.nodes() if n.status == EXPELLED}
            for name in fresh:
                if known[name] in expelled:
                    raise ValueError(f"the key of {name} was expelled; make a new one with `prfl deploy keys {name}`")
            _keep(home, fresh)
            register(home, found)
    else:
        _keep(home, fresh)
        lines.append("no server runs here now; it registers them when it starts")
    return lines


def expel(home: Home, name: str) -> list[str]:
    """Forget a node's key, and unregister it when a server runs. Raises ValueError."""
    file = home.nodes / f"{named(name)}.pub"
    if not file.exists():
        raise ValueError(f"no node {name} is admitted; have {', '.join(admitted(home)) or 'none'}")
    key = public_key(file)
    if home.served():
        with connected(home) as found:
            _unregister(found, lambda node: node.key == key)
        file.unlink()
        return [f"{name} is expelled"]
    file.unlink()
    return [f"{name} is expelled; no server runs here now, it takes notice when it starts"]


def settle(home: Home) -> list[str]:
    """What a server does when it starts: the registry becomes what `nodes/` says; a line for each change."""
    with connected(home) as found:
        wanted = set(admitted(home).values())
        gone = _unregister(found, lambda node: node.key not in wanted)
        return register(home, found) + [f"node {node.id} is no longer admitted" for node in gone]


def register(home: Home, found: Registry) -> list[str]:
    """Register the keys in `nodes/` that are not yet; a line for each, also for one that is refused."""
    known, lines = {node.key: node.status for node in found.nodes()}, []
    for name, key in admitted(home).items():
        if key not in known:
            lines.append(f"{name} is registered as node {found.register(key, name)}")
        elif known[key] == EXPELLED:
            lines.append(f"{name} stays out: its key was expelled; make a new one with `prfl deploy keys`")
    return lines


@contextmanager
def connected(home: Home) -> Iterator[Registry]:
    """The registry of the server that runs on this home. Raises ValueError when there is none."""
    server = home.read()
    if not server.get("superlink"):
        raise ValueError(f"no server runs on {home.folder}; start it with `prfl deploy server`")
    with registry(server["superlink"], None if server.get("insecure") else home.ca.read_bytes()) as found:
        yield found


def _unregister(found: Registry, which: Callable[[Registered], bool]) -> list[Registered]:
    gone = [node for node in found.nodes() if node.status != EXPELLED and which(node)]
    for node in gone:
        found.unregister(node.id)
    return gone


def _keep(home: Home, files: dict[str, Path]) -> None:
    home.nodes.mkdir(mode=0o700, exist_ok=True)
    for name, file in files.items():
        write(home.nodes / f"{name}.pub", file.read_bytes(), mode=0o644)
