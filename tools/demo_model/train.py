"""Train the demo model: `python -m tools.demo_model.train --out DIR --minutes 50 [--resume]`.

Runs on a GPU when there is one, else (slowly) on the CPU. The schedule follows the clock: warm-up, constant, and a decay over the last
part. It may be run in pieces: `--stop` ends one after so many minutes with a checkpoint, and `--resume` goes on from it with fresh data.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from . import chat, mixture
from . import tokenizer as bpe
from .batches import Batch, Feed
from .initial import initialise
from .model import DemoModel
from .place import DEMO, memory
from .shape import CONFIGS


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for matrices; equal shapes are stacked into one product."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
            for (rows, cols), params in shapes.items():
                grads = [p.grad for p in params]
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                updates = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"])).view(-1, rows, cols)
                scale = max(1.0, rows / cols) ** 0.5
                turned = orthogonal(updates).to(updates.dtype)
                torch._foreach_mul_(params, 1 - group["lr"] * group["decay"])
                torch._foreach_add_(params, [u.view(p.shape) for u, p in zip(turned, params, strict=True)], alpha=-group["lr"] * scale)


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrices."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def schedule(progress: float, step: int, cooldown: float) -> float:
    return min(1.0, (step + 1) / 100) * max(0.02, min(1.0, (1 - progress) / cooldown))


def fail(message: str) -> None:
    sys.exit(f"train: {message}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint; created if missing")
    parser.add_argument("--minutes", type=float, default=50, help="clock time the whole schedule takes, over all its pieces")
    parser.add_argument("--stop", type=float, default=1e9, help="end this piece after so many minutes")
    parser.add_argument("--config", choices=CONFIGS, default="demo")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--start", type=Path, help="begin a new schedule from these weights (an average.safetensors)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the matrix products; weights stay float32")
    parser.add_argument("--images", type=float, default=0.3, help="share of cases with images")
    parser.add_argument("--tokens", type=int, default=65536, help="in a batch")
    parser.add_argument("--longest", type=int, default=4096, help="longer cases are left out")
    parser.add_argument("--lr", type=float, default=0.02, help="of the matrices")
    parser.add_argument("--lr-rest", type=float, default=0.0015, help="of embeddings, norms and biases")
    parser.add_argument("--cooldown", type=float, default=0.35, help="share of the schedule that decays")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw cases; 0 draws them between steps")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> torch.device:
    """Say in one line what is wrong and leave, or make ready."""
    free = memory()
    if free < 3 << 30:
        fail(f"needs 3 GiB of free memory, found {free / 2**30:.1f}")
    if args.resume and not (args.out / "checkpoint.pt").is_file():
        fail(f"no checkpoint.pt to resume from in {args.out}")
    if args.start and not args.start.is_file():
        fail(f"no such file: {args.start}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and args.dtype != "bfloat16":
        fail("a GPU trains in bfloat16 only")
    if device.type == "cpu" and args.tokens > 8192:
        fail(f"--tokens {args.tokens} is too many for a CPU; take 2048")
    if not (DEMO / "tokenizer.json").is_file():
        bpe.save(bpe.build(mixture.corpus(1, 30_000)), DEMO, chat.TEMPLATE.read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    return device


class Run:
    """The model, its running average (what is shipped) and the optimizers."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.step, self.minutes = args, 0, 0.0
        torch.manual_seed(args.seed)
        model = DemoModel(CONFIGS[args.config])
        initialise(model, Tokenizer.from_file(str(DEMO / "tokenizer.json")))
        if args.start:
            model.load_state_dict({name: w.float() for name, w in load_file(args.start).items()})
        self.model = model.to(device)
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n]
        self.rest = [p for n, p in model.named_parameters() if not (p.ndim > 1 and "embed" not in n)]
        self.optimizers = [Muon(self.matrices, args.lr), torch.optim.AdamW(self.rest, args.lr_rest, betas=(0.9, 0.98), weight_decay=0.0)]
        if args.resume:
            state = torch.load(args.out / "checkpoint.pt", map_location=device, weights_only=True)
            if state["config"] != args.config:
                fail(f"checkpoint is of config {state['config']}, not {args.config}")
            self.model.load_state_dict(state["model"])
            self.average = state["average"]
            self.step, self.minutes = state["step"], state["minutes"]
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    def update(self, progress: float) -> None:
        factor = schedule(progress, self.step, self.args.cooldown)
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        for optimizer, rate in zip(self.optimizers, (self.args.lr, self.args.lr_rest), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.model.parameters()), max(0.002, 1 / (self.step + 1)))

    def save(self, minutes: float) -> None:
        path = self.args.out / "checkpoint.pt"
        part = path.with_suffix(".part")
        state = {"model": self.model.state_dict(), "average": self.average, "optimizers": [o.state_dict() for o in self.optimizers]}
        torch.save({**state, "step": self.step, "minutes": minutes, "config": self.args.config}, part)
        part.replace(path)
        halves = {name: w.half().contiguous() for name, w in self.average.items()}
        save_file(halves, self.args.out / "average.safetensors", metadata={"config": self.args.config})


class Meter:
    """Loss and next-token accuracy of every skill since the last report."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, len(mixture.POOL), device=device)

    def add(self, batch: Batch, losses: Tensor, hits: Tensor) -> None:
        real = (batch.weights > 0).float()
        self.sums.index_add_(1, batch.skills, torch.stack([losses * real, hits * real, real]))

    def report(self) -> str:
        loss, hits, count = self.sums.tolist()
        self.sums.zero_()
        lines = []
        for place, (_, skill) in enumerate(mixture.POOL):
            if count[place]:
                lines.append(f"{skill.__name__} {loss[place] / count[place]:.4f}/{100 * hits[place] / count[place]:.1f}")
        return "  ".join(lines)


def main() -> None:
    args = arguments()
    device = prepare(args)
    run = Run(args, device)
    forward = torch.compile(run.model, dynamic=False) if device.type == "cuda" else run.model
    feed = Feed(str(DEMO / "tokenizer.json"), f"{args.seed} {run.step}", args.images, args.tokens, args.longest)
    torch.multiprocessing.set_sharing_strategy("file_system")  # a batch is many tensors: too many for file descriptors
    several = {"num_workers": args.workers, "prefetch_factor": 2, "pin_memory": device.type == "cuda"} if args.workers else {}
    loader = iter(torch.utils.data.DataLoader(feed, batch_size=None, **several))
    meter, targets = Meter(device), 0
    began = reported = time.monotonic()
    before, ahead = run.minutes, move(next(loader), device)
    waited = 0.0
    while True:
        batch, minutes = ahead, (time.monotonic() - began) / 60
        progress = (before + minutes) / args.minutes
        if progress >= 1 or minutes >= args.stop:
            break
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss, losses, hits = forward(batch)
        loss.backward()
        meter.add(batch, losses, hits)
        run.update(progress)
        asked = time.monotonic()
        ahead = move(next(loader), device)
        waited += time.monotonic() - asked
        targets += 1
        if targets == 250 or (targets == 20 and run.step < 100):
            value, seconds = loss.item(), time.monotonic() - reported
            print(f"step {run.step} loss {value:.4f} {progress:.3f} {targets * args.tokens / seconds:.0f} tokens/s, {100 * waited / seconds:.0f} % waiting", flush=True)
            print("  " + meter.report(), flush=True)
            reported, targets, waited = time.monotonic(), 0, 0.0
    run.save(before + minutes)


def move(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in batch))


if __name__ == "__main__":
    main()
