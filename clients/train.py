"""Local training: what a client does with a task, one function in simulation and on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clients import personal, regrow, sparse, spectral, stacked, statistics
from clients.accelerator import CPU
from clients.asked import planned, received
from clients.descent import descent
from clients.outcome import Diverged, check, told
from clients.widths import drawn
from prfl.samples import Samples
from prfl.types import Task, Tree, Update, Work


def train(task: Task, model: nn.Module, samples: Samples, device: torch.device = CPU) -> Update:
    """Train the part of the task's parameters that its mask keeps, by mini-batch SGD on the client's samples.

    model: a skeleton; its own values do not matter, and it is left as it was. With channel masks the physically small
    model is trained; with weight masks gradients and weights stay masked. The result depends on nothing but the task
    and the samples, to the bit, on a given machine and number of threads. The network is trained on `device`, all else
    is done on the CPU: task, model, samples and update lie there. On a GPU the same task comes to the same update where
    torch has deterministic kernels for it; another kind of device rounds otherwise.
    With `Work.fast` convolutions have their channels last and, on the CPU, go by `clients.spectral` where kernels are
    large, and fully connected networks with plain SGD are trained by `clients.stacked`, as one client of a stack.
    Without it torch's own layers do it all: changes differ by at most 1e-4 of an entry's largest in the tests' tasks.

    Metrics: `loss` (mean over the samples seen, without the proximal term), `loss_first` and `loss_last` (of those
    mini-batches), `accuracy` (over the samples seen, before each step), `samples` (seen, repeats included), `steps`;
    with `Work.absent` "zero" also `class/<i>` = 1 for every class that the client has, with `Work.labels` its samples
    of it, with `Work.prune` those of `personal.pruned`. The weight is the number of samples that it trains on. Where
    `Work` lets a client change its mask, the update has another than the task. Diverged: a loss or a weight is not
    finite. ValueError: no samples, too few for BatchNorm, or a mask that the work can not be done with.
    """
    if device == CPU and stacked.stackable(model, task.work):
        (ended,) = stacked.train([task], model, [samples])
        if isinstance(ended, Diverged):
            raise ended
        return ended
    work = task.work
    samples, held_out = personal.apart(task, samples)
    net, values, held = received(task, model)
    start = held.apply(values)
    plan = planned(task, len(samples), whole=any(isinstance(m, _BatchNorm) for m in net.modules()))
    moves, passed = regrow.turn(task, len(plan)), personal.turn(work, len(samples), len(plan))
    first: Tree = {}
    measure = LOSSES[work.loss]
    present, sizes = torch.unique(samples.y, return_counts=True)
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    total: list[Tensor] | None = None
    packs = sparse.packs(net, task, device)
    with (
        _borrowed(net, start, task, device) as local,
        _scaled(net, task),
        sparse.packed(net, held, packs),
        spectral.lent(net, device) if work.fast else nullcontext(),
    ):
        weights = {k: p for k, p in net.named_parameters() if p.requires_grad}
        bits = {k: v for k, v in held.bits.items() if k in weights and k not in packs}
        shut = {k: torch.empty_like(weights[k].data).copy_(v) for k, v in bits.items()}
        descend = descent(work, [p.data for p in weights.values()], [shut.get(k) for k in weights])
        for step, (at, narrow) in enumerate(zip(plan, drawn(task, model, net, len(plan)), strict=True), 1):
            x, y = (v.to(device) for v in samples.batch(at))
            logits = (net if narrow is None or work.distil else narrow)(x)
            if work.absent == "zero":
                logits = _only(present, logits)
            loss = measure(logits, y)
            torch.autograd.backward(loss)
            if narrow is not None and work.distil:
                torch.autograd.backward(F.cross_entropy(narrow(x), logits.detach().softmax(1)))
            gradients = [_taken(p) for p in weights.values()]
            if statistics.needs_gradient(work) and (work.window == "all" or step == len(plan)):
                total = statistics.collect(total, gradients)
            if step == moves:
                now = {k: p.data.cpu() for k, p in weights.items()}
                held, stayed = regrow.regrown(held, now, _named(weights, [g.cpu() for g in gradients]), work.regrow)
                for k, mask in shut.items():
                    weights[k].data.mul_(stayed[k].to(device))
                    mask.copy_(held.bits[k])
            descend(gradients)
            if step == passed:
                first = {k: held.gather(k, v.data.cpu()).clone() for k, v in local.items()}
            losses.append(loss.detach())
            hits.append(logits.detach().argmax(1) == y)
            if work.patience and not work.steps and _weary(losses, plan, work):
                break
        delta = {
            k: packs[k].kept(weights[k].data) - held.gather(k, start[k])
            if k in packs
            else held.gather(k, v.data.cpu() - start[k])
            for k, v in local.items()
        }
    means = torch.stack(losses).tolist()
    check(means, delta, work)
    metrics = told(means, [len(h) for h in hits], int(torch.cat(hits).sum()))
    if work.absent == "zero" or work.labels:
        counts = sizes.tolist() if work.labels else [1] * len(sizes)
        metrics |= {f"class/{i}": float(n) for i, n in zip(present.tolist(), counts, strict=True)}
    done = replace(task, mask=held) if moves else task
    signal = None
    if work.report:
        gradient, change = _named(weights, [g.cpu() for g in total or ()]), {k: delta[k] for k in weights}
        signal = statistics.report(done, held, gradient, change, int(metrics["samples"]))
    update = Update(task.client, task.version, delta, done.mask, float(len(samples)), metrics, signal)
    return personal.pruned(update, task, model, held_out, first) if passed else update


def _weary(losses: Sequence[Tensor], plan: Sequence[Tensor], work: Work) -> bool:
    """Whether an epoch ends that is the last of `Work.patience` in a row without a smaller mean loss (AutoFLIP)."""
    size, done = len(plan) // work.epochs, len(losses)
    if done % size or done // size <= work.patience:
        return False
    sizes = torch.tensor([float(len(at)) for at in plan[:size]])
    means: list[float] = (
        torch.stack(list(losses)).cpu().view(-1, size) @ sizes
    ).tolist()  # every epoch has batches of the same sizes
    return min(means[: -work.patience]) <= min(means[-work.patience :])


@contextmanager
def _borrowed(net: nn.Module, start: Tree, task: Task, device: torch.device) -> Iterator[Tree]:
    """The entries of the network, lent for training with values of their own on `device`; afterwards all is as it was.

    But for the random numbers of a GPU, which nobody else draws.
    """
    tensors = net.state_dict(keep_vars=True)
    local = {k: t for k, t in tensors.items() if t.is_floating_point()}
    tensors = dict(net.named_buffers()) | tensors
    modules = list(net.modules())
    norms = [m for m in modules if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = {k: t.data for k, t in tensors.items()}
    modes = [m.training for m in modules]
    generator = torch.get_rng_state()
    torch.default_generator.manual_seed(task.seed)  # for dropout
    if device.type == "cuda":
        torch.cuda.manual_seed(task.seed)
    for k, t in tensors.items():
        t.data, t.grad = _own(start.get(k, t.data), device, task.work.fast), None
    for m in norms:
        m.track_running_stats = task.work.statistics == "share"
    net.train()
    try:
        yield local
    finally:
        for k, t in tensors.items():
            t.data, t.grad = before[k], None
        for m in norms:
            m.track_running_stats = True
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        torch.set_rng_state(generator)


def _own(value: Tensor, device: torch.device, fast: bool) -> Tensor:
    """A copy; fast: channels last for convolutions, which mostly run a tenth to a fifth faster that way."""
    layout = torch.channels_last if fast and value.dim() == 4 else torch.contiguous_format
    return value.to(device, copy=True, memory_format=layout)


@contextmanager
def _scaled(net: nn.Module, task: Task) -> Iterator[None]:
    """HeteroFL's Scaler (section 3): outputs of a cut layer are divided by the share of them that the client keeps.

    As published it is one rate per client; ours is each layer's own share, the same but for rounding.
    """
    hooks = []
    for name, module in net.named_modules() if task.work.scaler else ():
        kept = task.mask.sides(f"{name}.weight").get(0)
        if kept is not None and isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            share = len(kept) / task.params[f"{name}.weight"].shape[0]
            hooks.append(module.register_forward_hook(lambda _, __, out, share=share: out / share))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _named(weights: Iterable[str], tensors: Sequence[Tensor]) -> Tree:
    """Tensors in the order of the weights, by name; none at all where there are none."""
    return dict(zip(weights, tensors, strict=False))


def _taken(weight: nn.Parameter) -> Tensor:
    """The gradient of a weight, which is left without one; zero where the loss does not depend on it."""
    gradient, weight.grad = weight.grad, None
    return torch.zeros_like(weight) if gradient is None else gradient


def _only(present: Tensor, logits: Tensor) -> Tensor:
    """Logits, zero (not minus infinity) for classes that the client lacks: HeteroFL's masked cross-entropy."""
    return logits * logits.new_zeros(logits.shape[1]).index_fill_(0, present.to(logits.device), 1.0)


def _binary(logits: Tensor, y: Tensor) -> Tensor:
    """Binary cross-entropy on one-hot labels, mean over samples and classes."""
    return F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits).scatter_(1, y[:, None], 1.0))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": F.cross_entropy, "bce": _binary}
