"""Files of a run: written whole or not at all, read within bounds; checkpoints saved and resumed."""
import dataclasses
import hashlib
import json
import os
import secrets
import stat
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from arc_data import need
from harness import distributed
from lejepa import Config, checkpoint_digest, read_checkpoint

FREE_TO_CHANGE = ("run", "resume", "steps", "stop_on_alert")       # flags that a resumed run may give anew
LARGEST_JSON = 256 << 20                                           # bytes; a log of 100,000 steps has 40 MB

def write_file(path: Path, content: bytes, keep: Path | None = None):
    """Writes a file so that the old or the new one is always there, whole; `keep` renames the old one.

    The bytes go through a fresh temporary file beside it. What is not a regular file (a device, a pipe) is
    written directly, and a link is followed to its target. OSError names the file.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.part")
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            with open(path, "wb", buffering=0) as file:
                file.write(content)
            return
        with open(part, "xb") as file:                 # x: never an existing file, never through a link
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and target.exists():
            target.replace(keep)
        part.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        part.unlink(missing_ok=True)

def remove_parts(folder: Path):
    """Removes the temporary files that a kill left in the folder of a run that is locked."""
    for part in folder.glob(".*.part"):
        part.unlink()

def sync_folder(folder: Path):
    """Makes a renaming durable, where the system can (Windows cannot open a folder)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

def read_bytes(path: Path, most: int = LARGEST_JSON) -> bytes:
    """The content of a regular file of at most `most` bytes. ValueError for anything else."""
    need(path.is_file() or not path.exists(), f"{path}: not a regular file")
    need(path.stat().st_size <= most, f"{path}: larger than {most >> 20} MB")
    return path.read_bytes()

def read_json(path: Path) -> dict:
    """The JSON object in a file. ValueError of one line for anything else."""
    content = read_bytes(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    need(isinstance(value, dict), f"{path}: needs a JSON object, not a {type(value).__name__}")
    return value

def read_log(folder: Path) -> list[dict]:
    """The rows of log.jsonl, none where there is no such file. A last line without an end is left out."""
    path = folder / "log.jsonl"
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(read_bytes(path).split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        known = isinstance(row, dict) and isinstance(row.get("step"), int)
        need(known and all(value is None or type(value) in (int, float) for value in row.values()),
             f"{path}: line {number} is not a JSON object of numbers with a step")
        rows.append(row)
    return rows

def tasks_digest(tasks: dict) -> str:
    """SHA-256 over ids and cells, in order."""
    return hashlib.sha256(json.dumps(list(tasks.items()), default=np.ndarray.tolist).encode()).hexdigest()

def state_of(model, optimizers) -> dict[str, Tensor]:
    """Everything that a step changes, by name: weights, averaged weights, buffers, the optimizers' state."""
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for p, values in optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{p}.{name}": value for name, value in values.items()}
    return state

def save(folder: Path, model, optimizers, step: int, cfg: Config, commit: str, state: dict,
         is_best: bool = False):
    """Writes weights, optimizers, random state and step as last.safetensors, after renaming the old one.

    The best checkpoint is best.safetensors too. It is written first, so it is never behind the last one.
    """
    tensors = state_of(model, optimizers) | {"random": torch.get_rng_state()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"step": step, "commit": commit, "config": dataclasses.asdict(cfg), "state": state}
    metadata = {name: json.dumps(value) for name, value in metadata.items()}
    content = safetensors.torch.save(tensors, metadata | {"sha256": checkpoint_digest(tensors, metadata)})
    if is_best:
        write_file(folder / "best.safetensors", content)
    write_file(folder / "last.safetensors", content, keep=folder / "previous.safetensors")

def take_best(folder: Path, model):
    """Makes the best checkpoint the last one, and loads its weights."""
    content = read_bytes(folder / "best.safetensors", most=1 << 40)
    write_file(folder / "last.safetensors", content, keep=folder / "previous.safetensors")
    tensors, _, _ = read_checkpoint(folder)
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name[:6] == "model."})

def load_optimizer(optimizer, prefix: str, tensors: dict[str, Tensor]):
    """Puts an optimizer's state back. ValueError names the weight whose state is missing or does not fit."""
    state = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            p, key = name.removeprefix(prefix).split(".")
            state.setdefault(int(p), {})[key] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p, parameter in enumerate(parameters):
        found = state.get(p, {}).values()
        fits = all(value.shape in ((), parameter.shape) and value.dtype == parameter.dtype for value in found)
        need(fits and bool(state) == (p in state),
             f"it does not fit this model: {prefix}{p} is missing or of another shape")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

def resume(model, optimizers, cfg: Config, commit: str, digest: str) -> tuple[int, dict]:
    """Loads the run's checkpoint and cuts its log back to it. Returns its step and the log's counters.

    ValueError names a flag or data that changed. Nothing on disk is touched before everything is checked.
    """
    folder = Path(cfg.run)
    tensors, found, path = read_checkpoint(folder)
    try:
        check_flags(cfg, found)
        need("state" in found, f"{path} holds averaged weights alone: it can be evaluated, not continued")
        need(found["state"]["tasks_sha256"] == digest, "the tasks of --data or --validate changed since the "
             f"run in {cfg.run} began; put them back, or train in another --run folder")
        weights = {name: value for name, value in tensors.items() if name.startswith("model.")}
        model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
        for name, value in state_of(model, []).items():
            if value.dtype != weights[name].dtype:
                raise TypeError(f"{name} is {weights[name].dtype}, not {value.dtype}")
        for number, optimizer in enumerate(optimizers):
            load_optimizer(optimizer, f"optimizer.{number}.", tensors)
        torch.set_rng_state(tensors["random"])
        log = (folder / "log.jsonl").read_bytes()[:found["state"]["log_bytes"]]
        need(hashlib.sha256(log).hexdigest() == found["state"]["log_sha256"],
             f"{folder / 'log.jsonl'} is not the log of step {found['step']}; put it back, or train in "
             "another --run folder")
        if (folder / "config.json").exists():
            read_json(folder / "config.json")          # the run will rewrite it
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{path}: of another version of lejepa.py: {message}") from None
    if distributed.rank():
        return found["step"], found["state"]           # the first rank has done the rest
    say_changes(cfg, found, commit)
    write_file(folder / "log.jsonl", log)
    if path.name != "last.safetensors":
        path.replace(folder / "last.safetensors")      # a damaged one never becomes the previous one
    return found["step"], found["state"]

def check_flags(cfg: Config, found: dict):
    """ValueError for a flag that differs from the checkpoint's and is not free to change."""
    now = json.loads(json.dumps(dataclasses.asdict(cfg)))
    for name, value in found["config"].items():
        if name not in FREE_TO_CHANGE and now.get(name) != value:
            given = "not given" if now.get(name) is None else f"{now.get(name)} now"
            made = "without it" if value is None else f"with {value}"
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {given}, and the run in {cfg.run} was made {made}; "
                             "give the same to continue it, or train in another --run folder")
    need(found["step"] <= cfg.steps,
         f"--steps {cfg.steps}: the run in {cfg.run} is at step {found['step']} already")

def say_changes(cfg: Config, found: dict, commit: str):
    """Prints what may change from here on: steps, threads, commit."""
    made, threads, ranks = found["config"]["steps"], found["state"]["threads"], found["state"].get("ranks", 1)
    written, here, now = found["commit"] or "unknown", commit or "unknown", torch.get_num_threads()
    lines = {f"--steps {cfg.steps}: the run was made with {made}; it continues from step {found['step']}":
                 made != cfg.steps,
             f"the checkpoint was written with {threads} threads, this run has {now}: from here on it no "
             "longer equals an uninterrupted run bit for bit": threads != now,
             f"the checkpoint was written by {ranks} processes, this run has {distributed.ranks()}: "
             "from here on it equals an uninterrupted run up to rounding and dropout":
                 ranks != distributed.ranks(),
             f"the checkpoint was written by commit {written}, this is {here}: where they differ, the run no "
             "longer equals an uninterrupted one": written != here}
    for line in (line for line, has_changed in lines.items() if has_changed):
        print(line, file=sys.stderr)
# ----------------------------------------------------------------------------------------------- a release
def release(run: Path, folder: Path):
    """Writes the averaged weights alone, which is all that load_run reads, as <folder>/last.safetensors."""
    tensors, metadata, _ = read_checkpoint(run)
    tensors = {name: value for name, value in tensors.items() if name.startswith("model.averaged.")}
    metadata = {name: json.dumps(metadata[name]) for name in ("step", "commit", "config")}
    content = safetensors.torch.save(tensors, metadata | {"sha256": checkpoint_digest(tensors, metadata)})
    write_file(folder / "last.safetensors", content)

if __name__ == "__main__":                             # python -m harness.checkpoint RUN FOLDER
    release(Path(sys.argv[1]), Path(sys.argv[2]))
