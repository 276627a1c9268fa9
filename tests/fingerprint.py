"""Whether training still gives the same bits: 20 steps of every quantizer and objective against a record.

    python tests/fingerprint.py             compare with tests/fingerprints.json; about two minutes
    python tests/fingerprint.py --write     replace the record, after an intended change of training

A fingerprint is the SHA-256 over the sorted SHA-256 of every tensor that a step changes: weights, averaged
weights, buffers and the optimizers' state. Names do not count, so a renamed module keeps its fingerprint. The
bits depend on torch's version and on the instructions of the CPU; the record names both.
"""
import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import arc_data
import lejepa
from harness.checkpoint import state_of

RECORD = Path(__file__).with_name("fingerprints.json")
STEPS = 20
METHODS = [(code, objective) for code in ("gaussian", "ema", "none") for objective in ("lejepa", "infonce")]


def this_machine() -> dict:
    """What the bits depend on beside the code."""
    return {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}


def fingerprint(tensors: dict) -> str:
    """SHA-256 of tensors, whatever their names and order."""
    digests = []
    for value in tensors.values():
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digests.append(hashlib.sha256(content).hexdigest())
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def train_steps(data: arc_data.TaskSet, code: str, objective: str) -> str:
    """The fingerprint after 20 steps of the default run's training with this code and objective."""
    cfg = lejepa.Config(steps=STEPS, size="small", device="cpu", code=code, objective=objective)
    cfg = lejepa.resolve_defaults(cfg)
    model = lejepa.build(cfg)
    optimizers = lejepa.make_optimizers(model, cfg)
    lejepa.train(model, optimizers, data, cfg, after_step=lambda *args: False)
    return fingerprint(state_of(model, optimizers))


def compute(methods=METHODS) -> dict[str, str]:
    """The fingerprint of each method, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tasks, _, _ = arc_data.split(lejepa.Config.data, None)
        data = arc_data.TaskSet(tasks, "cpu", lejepa.Config.demonstrations)
        found = {}
        for code, objective in methods:
            begin = time.monotonic()
            found[f"{code}-{objective}"] = train_steps(data, code, objective)
            seconds = time.monotonic() - begin
            print(f"{code}-{objective}: {found[f'{code}-{objective}'][:16]} in {seconds:.0f} s", flush=True)
        return found
    finally:
        torch.set_num_threads(threads)


def write_record():
    record = this_machine() | {"dtype": lejepa.Config.dtype, "steps": STEPS, "sha256": compute()}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def compare() -> int:
    """The exit status: 0 for equal bits, 1 for other bits, 2 where they cannot be compared."""
    record = json.loads(RECORD.read_text())
    recorded = {name: record[name] for name in this_machine()}
    if recorded != this_machine():
        print(f"nothing to compare: the record was made with {recorded}, this is {this_machine()}")
        return 2
    found = compute()
    different = [name for name, digest in found.items() if digest != record["sha256"].get(name)]
    print(f"training changed: {', '.join(different)}" if different else "training gives the recorded bits")
    return 1 if different else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare 20 training steps with tests/fingerprints.json.")
    parser.add_argument("--write", action="store_true", help="replace the record")
    if parser.parse_args().write:
        return write_record()
    return compare()


if __name__ == "__main__":
    sys.exit(main())
