"""Several processes train as one: `torchrun --nproc-per-node N -- lejepa.py ...`, by NCCL or gloo.

Each process, a rank, draws the same batch, encodes the grids of its own tasks, and computes the loss of the
whole batch. DistributedDataParallel averages the gradients, so all ranks hold the same weights, bit for bit.
"""
import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lejepa
from arc_data import Batch, TaskSet, upload
from lejepa import Config

PATIENCE = 20                                  # seconds from a signal to the end of a rank that is stuck
store = None                                   # what ranks tell each other outside of a step
voice = None                                   # where a rank that prints nothing else reports an error

# ------------------------------------------------------------------------------------------------ processes


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start(cfg: Config, url: str = "env://"):
    """Joins the processes that torchrun began. For a single one nothing happens. ValueError for bad flags."""
    global store
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    given = {"--objective infonce": cfg.objective == "infonce", "--code ema": cfg.code == "ema",
             "--profile": cfg.profile}
    for flag in (flag for flag, used in given.items() if used):
        raise ValueError(f"{flag} works in one process alone; leave torchrun out")
    if cfg.device == "cuda":
        local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if local > gpus:                               # which every rank finds, before any waits for another
            raise ValueError(f"--nproc-per-node {local}: each process needs a GPU; this machine has {gpus}")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    store, number, count = next(dist.rendezvous(url))
    dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo", None, store=store, rank=number,
                            world_size=count)
    end_when_stuck()


def end_when_stuck():
    """Ends a rank PATIENCE seconds after a signal even where it waits, outside of Python, for a lost rank."""
    inlet, outlet = os.pipe()
    os.set_blocking(outlet, False)
    signal.set_wakeup_fd(outlet, warn_on_full_buffer=False)

    def watch():
        os.read(inlet, 1)
        time.sleep(PATIENCE)
        report("stopped by a signal while it waited for another process; the last checkpoint is kept")
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def one_voice():
    """Ranks other than the first print no result, and inside it no error: all of them find the same."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or os.environ.get("RANK", "0") == "0":
        yield
        return
    global voice
    voice, sys.stdout = sys.stderr, open(os.devnull, "w")
    with contextlib.redirect_stderr(sys.stdout):
        yield


def is_lost_rank(error: Exception) -> bool:
    """Whether an operation failed because another rank ended or cannot be reached."""
    return ranks() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def report(line: str):
    """Prints an error once for all ranks: the first that finds one prints it."""
    try:
        first = store is None or store.add("reported", 1) == 1
    except RuntimeError:                               # the store ended with the launcher
        first = True
    if first:
        print(f"lejepa.py: {line}", file=voice or sys.stderr, flush=True)


def share_folder(cfg: Config) -> Config:
    """The Config with the run's folder, which the first rank has opened. The others wait for it."""
    if ranks() == 1:
        return cfg
    if rank() == 0:
        store.set("run", cfg.run)
    return dataclasses.replace(cfg, run=store.get("run").decode())


@contextlib.contextmanager
def first_rank_first():
    """The first rank does what stands inside; then the others do, with the files that it left."""
    if rank():
        store.wait(["first rank"])
    yield
    if ranks() > 1:
        store.set("first rank", "done")


def agree(stop: int, alerted: bool, device: str) -> tuple[int, bool]:
    """The highest signal number of all ranks, and whether one of them has an alert. Waits for the device."""
    if ranks() == 1:
        return stop, alerted
    flags = torch.tensor([stop, alerted], device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    stop, alerted = flags.tolist()
    return stop, bool(alerted)


# -------------------------------------------------------------------------------------------------- batches


class Part(Batch):
    """A rank's part of a batch. `targets` are those of all ranks, in the rows of z and of what is gathered.

    Two more fields: `sent`, this rank's own targets, repeated up to the most that a rank has, and `windows`,
    the number of windows of all ranks.
    """


class RankTasks(TaskSet):
    """Training tasks of which a batch is a rank's part: a run of its tasks, with their grids and windows."""

    def batch(self, size: int, seed: int, step: int) -> Part:
        """The part of this rank. A shape of several ranks is in the object_sample of the first alone."""
        grids, symmetry, colours, index, shown, sample, arrays = self.draw(size, seed, step)
        tasks = len(grids) // (2 * self.pairs)
        owner = (np.arange(tasks) * ranks() // tasks).repeat(2 * self.pairs)   # the rank of each grid
        first, end = np.searchsorted(owner, [rank(), rank() + 1])              # this rank's grids
        slots, distinct = arrays[0], arrays[3]
        filled = slots[3] < len(grids)
        holder = np.full(len(distinct), ranks())
        np.minimum.at(holder, slots[0][filled], owner[slots[3][filled]])       # the first rank of each shape
        arrays = self.table.arrange(grids[first:end], symmetry[first:end], colours[first:end])
        sample = np.searchsorted(arrays[3], distinct[sample[holder[sample] == rank()]])
        place = owner[index[:, -1]]                                            # the rank of each window
        targets = [np.unique(index[place == r, -1]) for r in range(ranks())]
        most = max(map(len, targets))
        rows = [end - first + r * most + np.arange(len(targets[r])) for r in range(ranks())]
        rows[rank()] = targets[rank()] - first
        own, sent = place == rank(), np.resize(rows[rank()], most)
        arrays = [index[own] - first, shown[own], np.concatenate(rows), sample, sent, *arrays]
        part_index, shown, targets, sample, sent, *arrays = upload(arrays, self.table.device)
        part = Part(self.table.fill(*arrays), part_index, shown.bool(), targets, sample)
        part.sent, part.windows = sent, len(index)
        return part


# ---------------------------------------------------------------------------------------------------- model


class SumOverRanks(torch.autograd.Function):
    """The sum of x over all ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return SumOverRanks.forward(ctx, grad)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm with the statistics of all ranks. torch.nn.SyncBatchNorm takes no CPU tensors."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        away = x.float() - self.running_mean           # near 0, so that squares lose no digits
        sums = [away.sum(0), away.square().sum(0), away.new_full((1,), len(x))]
        sums = SumOverRanks.apply(torch.cat(sums))
        count = sums[-1].detach()
        mean, square = (sums[:-1] / count).chunk(2)
        variance = square - mean.square()
        with torch.no_grad():
            self.running_mean.add_(self.momentum * mean)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        return ((away - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)


def pool_means(means: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means (V M, T, 2) of cos and sin over the samples of all ranks, and their number.

    A rank has two samples of 0 beside its own, so that it has some: their cos is 1 and their sin is 0.
    """
    sums = torch.cat([count * means.flatten(), means.new_full((1,), count)])
    dist.all_reduce(sums)
    count = sums[-1] - 2 * ranks()
    of_zeros = 2 * ranks() * (1 - torch.arange(2, device=means.device))
    return (sums[:-1].view_as(means) - of_zeros) / count, count


class Replica(DistributedDataParallel):
    """The model on one rank, for `train`. It is its own objective: it puts what other ranks have beside what
    this one has, and the model's objective finds the loss of the whole batch."""
    objective = property(lambda self: self)
    averaged = property(lambda self: self.module.averaged)
    state_dict = property(lambda self: self.module.state_dict)
    load_state_dict = property(lambda self: self.module.load_state_dict)

    def forward(self, part: Part):
        torch.manual_seed(torch.initial_seed() + (rank() << 40))               # dropout differs by rank
        return super().forward(part)

    def compute_loss(self, _, part: Part, z, z_hat, y, directions, code_directions, lam: float):
        """The loss of the whole batch and its terms, on every rank. Gradients flow into this rank's part and
        are multiplied by the number of ranks, because DDP divides by it."""
        objective, own = self.module.objective, z[part.sent].detach()
        if len(objective.memory):
            gathered = own.new_empty(ranks() * len(own), own.shape[1])
            dist.all_gather_single(gathered, own)
            z, targets = torch.cat([z, gathered]), part.targets
        else:                                          # all inputs and all outputs are tested, no targets
            z, targets = torch.cat([z, z.new_zeros(4, z.shape[1])]), part.sent
        y = torch.cat([y, y.new_zeros(2, y.shape[1])])
        sample = torch.cat([part.object_sample, torch.arange(len(y) - 2, len(y), device=y.device)])
        batch = Batch(part.grids, part.index, part.shown, targets, sample)
        alone, lejepa.pool_means = lejepa.pool_means, pool_means
        try:
            inputs = z, z_hat, y, directions, code_directions, lam
            loss, terms = objective.compute_loss(self.module, batch, *inputs)
        finally:
            lejepa.pool_means = alone
        own, share = terms["prediction"], len(z_hat) / part.windows
        prediction = share * own.detach()
        dist.all_reduce(prediction)
        mine = loss + (1 - lam) * (share - 1) * own    # the gradients of `mine` add up over ranks
        value = (loss + (1 - lam) * (prediction - own)).detach()
        return value + ranks() * (mine - mine.detach()), terms | {"prediction": prediction}


def replicate(model, data: TaskSet, cfg: Config):
    """The model as `train` takes it: itself for one process. ValueError for a batch of too few tasks."""
    if ranks() == 1:
        return model
    windows = data.pairs * (data.pairs - 1)            # of a task
    if -(-cfg.batch_size // windows) < ranks():
        raise ValueError(f"--batch-size {cfg.batch_size}: {ranks()} processes need a task each; give at "
                         f"least {windows * (ranks() - 1) + 1}")
    for part in model.modules():
        if type(part) is nn.BatchNorm1d:
            part.__class__ = BatchNorm                 # its parameters stay, and so does the optimizer
    return Replica(model, forward_sync_buffers=False)
