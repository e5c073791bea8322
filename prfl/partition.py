"""Who owns which training sample, and what is wrong with it: splits over clients, and noise by client."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prfl.samples import Samples


class Partition(Protocol):
    """From labels (int64, (N,)) and natural ids (int64, (N,) or None) to the indices of every client's samples.

    Every sample is given to exactly one client and no client stays without; the same seed gives the same split.
    The order of a client's indices is random, natural's by id. ValueError: not possible, one line with what to change.
    """

    def __call__(self, labels: Tensor, natural: Tensor | None, clients: int, seed: int) -> list[Tensor]: ...


@dataclass(frozen=True)
class iid:
    """Equal shares of the shuffled samples; sizes differ by one at most."""

    def __call__(self, labels: Tensor, natural: Tensor | None, clients: int, seed: int) -> list[Tensor]:
        return _split("iid", lambda of, _: of.IidPartitioner(clients), labels, clients, seed, "lower clients")


@dataclass(frozen=True)
class dirichlet:
    """Label skew: each class is dealt in shares drawn from Dirichlet(alpha) (Yurochkin et al. 2019; Hsu et al. 2019).

    Drawn anew, ten times at most, until every client has `min_size` samples.
    """

    alpha: float = 0.5
    min_size: int = 1

    def __post_init__(self) -> None:
        if self.alpha <= 0 or self.min_size < 1:
            raise ValueError(
                f"dirichlet: needs alpha above 0 and min_size 1 or more, got {self.alpha:g}, {self.min_size}"
            )

    def __call__(self, labels: Tensor, natural: Tensor | None, clients: int, seed: int) -> list[Tensor]:
        def make(of: Any, seed: int) -> Any:
            return of.DirichletPartitioner(clients, "key", float(self.alpha), self.min_size, seed=seed)

        advice = f"raise alpha ({self.alpha:g}), or lower clients or min_size ({self.min_size})"
        return _split("dirichlet", make, labels, clients, seed, advice)


@dataclass(frozen=True)
class pathological:
    """So many classes a client: one in turn, the others at random; a class goes in equal parts to those who have it.

    Client i has class i modulo their number. With fewer clients than classes some may have no owner: an error.
    """

    classes_per_client: int = 2

    def __post_init__(self) -> None:
        if self.classes_per_client < 1:
            raise ValueError(f"pathological: classes_per_client must be 1 or more, got {self.classes_per_client}")

    def __call__(self, labels: Tensor, natural: Tensor | None, clients: int, seed: int) -> list[Tensor]:
        def make(of: Any, seed: int) -> Any:
            mode = "first-deterministic"
            return of.PathologicalPartitioner(clients, "key", self.classes_per_client, mode, seed=seed)

        present = len(np.unique(labels.numpy()))
        if self.classes_per_client > present:
            raise ValueError(
                f"partition pathological: classes_per_client is {self.classes_per_client} of {present} classes"
            )
        advice = f"take {present} clients (one a class) or more, fewer classes_per_client, or partition shards"
        return _split("pathological", make, labels, clients, seed, advice)


@dataclass(frozen=True)
class shards:
    """Samples sorted by label and cut into equal shards, so many a client (McMahan et al. 2017, section 3).

    Where they do not divide evenly (ours), what is left makes further shards, one each for the first clients.
    """

    shards_per_client: int = 2

    def __post_init__(self) -> None:
        if self.shards_per_client < 1:
            raise ValueError(f"shards: shards_per_client must be 1 or more, got {self.shards_per_client}")

    def __call__(self, labels: Tensor, natural: Tensor | None, clients: int, seed: int) -> list[Tensor]:
        def make(of: Any, seed: int) -> Any:
            size = len(labels) // (clients * self.shards_per_client)
            return of.ShardPartitioner(clients, "key", shard_size=size, keep_incomplete_shard=True, seed=seed)

        advice = f"lower clients or shards_per_client ({self.shards_per_client})"
        if clients * self.shards_per_client > len(labels):
            raise _impossible("shards", clients, len(labels), advice)
        return _split("shards", make, labels, clients, seed, advice)


@dataclass(frozen=True)
class quantity:
    """Quantity skew (ours): sizes in proportion to log-normal draws, exp(sigma z), above `min_size` for everyone."""

    sigma: float = 1.0
    min_size: int = 1

    def __post_init__(self) -> None:
        if self.sigma < 0 or self.min_size < 1:
            raise ValueError(f"quantity: needs sigma 0 and min_size 1 or more, got {self.sigma:g}, {self.min_size}")

    def __call__(self, labels: Tensor, natural: Tensor | None, clients: int, seed: int) -> list[Tensor]:
        free = len(labels) - clients * self.min_size

        def make(of: Any, seed: int) -> Any:
            weight = np.random.default_rng(seed).lognormal(0, self.sigma, clients)
            ends = np.rint(free * weight.cumsum() / weight.sum()).astype(int)
            return of.SizePartitioner([int(size) + self.min_size for size in np.diff(ends, prepend=0)])

        advice = f"lower clients or min_size ({self.min_size})"
        if free < 0:
            raise _impossible("quantity", clients, len(labels), advice)
        return _split("quantity", make, labels, clients, seed, advice)


@dataclass(frozen=True)
class natural:
    """Whoever made the samples owns them: a client is a block of neighbouring ids, all of as many ids within one.

    With as many clients as ids each id is a client. shuffle: the blocks are of random ids instead (ours).
    """

    shuffle: bool = False

    def __call__(self, labels: Tensor, natural: Tensor | None, clients: int, seed: int) -> list[Tensor]:
        if natural is None:
            raise ValueError(
                "partition natural: this data set does not tell who made its samples; take another partition"
            )
        ids, rank = np.unique(natural.numpy(), return_inverse=True)
        if clients > len(ids):
            raise ValueError(f"partition natural: {clients} clients, but samples of {len(ids)} makers; lower clients")
        if self.shuffle:
            rank = np.random.default_rng(seed).permutation(len(ids))[rank]
        block = torch.from_numpy(rank * clients // len(ids))

        def make(of: Any, _: int) -> Any:
            return of.GroupedNaturalIdPartitioner("key", 1, sort_unique_ids=True)

        return _split("natural", make, block, clients, seed, "lower clients")


@dataclass(frozen=True)
class Noise:
    """What is wrong with a client's samples, whatever the partition.

    labels: this share of them is changed, each to another class at random. features: Gaussian noise of this standard
    deviation on the normalised values, drawn once. grow: the i-th of N clients, from 1, has i / N of both, as in
    NIID-Bench (Li et al. 2022, feature noise; its code counts clients from 0 and draws at every read).
    """

    labels: float = 0.0
    features: float = 0.0
    grow: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.labels <= 1 or self.features < 0:
            raise ValueError(
                f"noise: labels must be in [0, 1], features not negative, got {self.labels}, {self.features}"
            )

    def apply(self, samples: Samples, client: int, clients: int, classes: int, seed: int) -> Samples:
        """The client's samples with its noise; depends on nothing but the arguments."""
        if not self.labels and not self.features:
            return samples
        level = (client + 1) / clients if self.grow else 1.0
        rng = np.random.default_rng([seed, client])
        at = torch.from_numpy(rng.permutation(len(samples)))[: round(self.labels * level * len(samples))]
        y = samples.y.clone()
        y[at] = (y[at] + torch.from_numpy(rng.integers(1, classes, len(at)))) % classes
        if not self.features:
            return replace(samples, y=y)
        noise = torch.from_numpy(rng.standard_normal(samples.x.shape, dtype=np.float32))
        std = torch.tensor(samples.std, dtype=torch.float32).view(-1, 1, 1)
        return replace(samples, x=samples.x + self.features * level * std * noise, y=y)


def report(parts: Sequence[Tensor], labels: Tensor, classes: int) -> dict[str, Any]:
    """The split as plain data: `clients`, `samples`, `sizes` by client, `counts` by client and class."""
    counts = [torch.bincount(labels[part], minlength=classes).tolist() for part in parts]
    sizes = [len(part) for part in parts]
    return {"clients": len(parts), "samples": sum(sizes), "sizes": sizes, "counts": counts}


def _split(
    kind: str, make: Callable[[Any, int], Any], key: Tensor, clients: int, seed: int, advice: str
) -> list[Tensor]:
    """Run one of flwr-datasets' partitioners, `make(module, seed)`, over a shuffled table of indices and keys."""
    if not 1 <= clients <= len(key):
        raise ValueError(f"partition {kind}: {clients} clients for {len(key)} samples; needs 1 to {len(key)} clients")
    try:
        import datasets
        from flwr_datasets import partitioner as of
    except ImportError as error:
        raise ImportError(f"partition {kind} needs flwr-datasets; install prfl[sim] ({error})") from None
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(key))
    columns = {"index": order, "key": key.numpy()[order]}
    # read as Arrow: flwr-datasets walks columns value by value, which is many times slower in other formats
    table = datasets.Dataset.from_dict(columns).with_format("arrow")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            partitioner = make(of, int(rng.integers(2**31)))
            partitioner.dataset = table
            rows = [partitioner.load_partition(client)[:]["index"].to_numpy() for client in range(clients)]
        except ValueError:
            raise _impossible(kind, clients, len(key), advice) from None
    if min(map(len, rows)) == 0 or sum(map(len, rows)) != len(key):
        raise _impossible(kind, clients, len(key), advice)
    return [torch.from_numpy(row.copy()) for row in rows]


def _impossible(kind: str, clients: int, samples: int, advice: str) -> ValueError:
    return ValueError(
        f"partition {kind}: no split of {samples} samples over {clients} clients gives every sample an owner "
        f"and every client enough; {advice}"
    )


TABLE: dict[str, Callable[..., Partition]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "pathological": pathological,
    "shards": shards,
    "quantity": quantity,
    "natural": natural,
}
