"""Sub-FedAvg (Vahidian et al., ICDCSW 2021): every client prunes its own sub-model; what is shared is averaged."""

from __future__ import annotations

from dataclasses import replace

from prfl import merge
from prfl.checks import fraction, least, share
from prfl.cut import Cut
from prfl.ownership import own, personal
from prfl.types import Work
from strategies.method import Method, never

PAPER = "Vahidian et al., ICDCSW 2021, arXiv 2105.00562"


def sub_fedavg(
    hybrid: bool = False,
    step: float = 0.1,
    target: float = 0.3,
    apart: float = 1e-4,
    channel_step: float = 0.45,
    channels_to: float = 0.5,
    channels_apart: float = 0.01,
    accuracy: float = 0.5,
    holdout: float = 0.2,
    work: Work = Work(),
) -> Method:
    """With `sync` pacing. As published: after its last pass a client gives up, for good, the `step` of each layer's
    weights with least |w|, if that mask is further than `apart` from what the first pass led to, less than `target` is
    pruned, and the pruned model has the `accuracy`. Each weight is the plain mean over the clients that hold it.

    hybrid: channels with a BatchNorm go by |scale|, `channel_step` of them, down to `channels_to`, if `channels_apart`;
    only fully connected layers are pruned weight by weight. The reference runs it with target=0.5, apart=5e-4.
    Ours: accuracy is that on the client's `holdout`, which it does not train on, where the reference takes its test
    data; the server remembers each client's mask, so that 9 bytes name it; both kinds end near the target alike;
    without a second pass "the first" is the first step.
    """
    for name, value in (("step", step), ("channel_step", channel_step), ("target", target), ("holdout", holdout)):
        fraction("sub_fedavg", name, value)
    for name, value in (("apart", apart), ("channels_apart", channels_apart), ("accuracy", accuracy)):
        least("sub_fedavg", name, value, 0)
    share("sub_fedavg", "channels_to", channels_to)
    pruning = replace(
        work,
        prune=step,
        prune_to=1 - target,
        prune_apart=apart,
        prune_channels=channel_step if hybrid else 0.0,
        channels_to=channels_to,
        channels_apart=channels_apart,
        prune_accuracy=accuracy,
        holdout=holdout,
    )
    return Method(
        density=own(),
        cut=Cut(unit="channels", width="linear", named=True) if hybrid else Cut(),
        merge=merge.heterofl(),
        work=pruning,
        remask=never(),
        amend=personal(hybrid),
    )
