"""The methods by name, and how a method's YAML becomes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prfl import config, cut, density, merge, saliency, valuation
from prfl.config import ConfigError, Spec
from prfl.types import Work
from strategies import (
    autoflip,
    data_value,
    fedasync,
    fedavg,
    fedbuff,
    feddst,
    fedfix,
    fedgmr,
    fedmp,
    fedprox,
    fjord,
    heterofl,
    myfed,
    pr_fl,
    prunefl,
    sub_fedavg,
    syn_fl,
    unified,
    up_fl,
)
from strategies.method import Method, never, rerank


@dataclass(frozen=True)
class Row:
    """`make(...)`: the method with its options; `pacing`: the one its paper runs it in."""

    make: Callable[..., Method]
    paper: str
    pacing: str


METHODS: dict[str, Row] = {
    "fedavg": Row(fedavg.fedavg, fedavg.PAPER, "sync"),
    "fedprox": Row(fedprox.fedprox, fedprox.PAPER, "sync"),
    "fedasync": Row(fedasync.fedasync, fedasync.PAPER, "one_arrival"),
    "fedbuff": Row(fedbuff.fedbuff, fedbuff.PAPER, "buffered"),
    "fedfix": Row(fedfix.fedfix, fedfix.PAPER, "window"),
    "heterofl": Row(heterofl.heterofl, heterofl.PAPER, "sync"),
    "pr_fl": Row(pr_fl.pr_fl, pr_fl.PAPER, "window"),
    "fedgmr": Row(fedgmr.fedgmr, fedgmr.PAPER, "window"),
    "myfed": Row(myfed.myfed, myfed.PAPER, "one_arrival"),
    "unified": Row(unified.unified, unified.PAPER, "sync"),
    "autoflip": Row(autoflip.autoflip, autoflip.PAPER, "sync"),
    "fedmp": Row(fedmp.fedmp, fedmp.PAPER, "sync"),
    "data_value": Row(data_value.data_value, data_value.PAPER, "sync"),
    "up_fl": Row(up_fl.up_fl, up_fl.PAPER, "sync"),
    "syn_fl": Row(syn_fl.syn_fl, syn_fl.PAPER, "sync"),
    "prunefl": Row(prunefl.prunefl, prunefl.PAPER, "sync"),
    "feddst": Row(feddst.feddst, feddst.PAPER, "sync"),
    "fjord": Row(fjord.fjord, fjord.PAPER, "sync"),
    "sub_fedavg": Row(sub_fedavg.sub_fedavg, sub_fedavg.PAPER, "sync"),
}

PARTS: dict[str, dict[str, Callable[..., Any]]] = {
    "density": density.TABLE,
    "saliency": saliency.TABLE,
    "merge": merge.TABLE,
    "cut": {"cut": cut.Cut},
    "remask": {"rerank": rerank, "never": never},
    "valuation": valuation.TABLE,
}


def method(spec: Spec, work: Work) -> Method:
    """A method by name with options, or its parts themselves; `work` is the experiment's. Raises ConfigError."""
    if isinstance(spec, str) or "name" in spec:
        table = {name: row.make for name, row in METHODS.items()}
        return config.part("method", spec, table, work=work)  # type: ignore[no-any-return]
    if extra := [kind for kind in spec if kind not in PARTS]:
        raise ConfigError(f"method: no part {extra[0]!r}; have {', '.join(PARTS)}, or the name of a method")
    parts = {kind: config.part(kind, _named(kind, value), PARTS[kind]) for kind, value in spec.items()}
    return Method(**parts, work=work)


def spelled(spec: Spec) -> dict[str, Any]:
    """The spec of a method that can be built, every option written out."""
    if isinstance(spec, str) or "name" in spec:
        return config.spelled(spec, {name: row.make for name, row in METHODS.items()})
    rest = Method()
    return {
        kind: config.spelled(_named(kind, spec[kind]), rows)
        if kind in spec
        else config.described(getattr(rest, kind), rows)
        for kind, rows in PARTS.items()
    }


def described(m: Method) -> tuple[str, ...]:
    """The names of a method's parts: density, saliency, merge, cut, remask."""
    cut = f"{m.cut.unit} by {m.cut.spread}"
    return (*(type(p).__name__ for p in (m.density, m.saliency, m.merge)), cut, type(m.remask).__name__)


def _named(kind: str, spec: Spec) -> Spec:
    """A cut and a remask may go without a name."""
    usual = {"cut": "cut", "remask": "rerank"}
    return {"name": usual[kind], **spec} if kind in usual and isinstance(spec, dict) else spec
