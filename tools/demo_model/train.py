"""Train the demo model: `python -m tools.demo_model.train --out DIR --minutes 60 [--resume]`.

Runs on a GPU when there is one, else on the CPU. The schedule follows the clock: warm-up, constant, and a decay over the last part.
A checkpoint is written every few minutes, and `--resume` goes on from it with fresh data.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tokenizers import Tokenizer
from torch import Tensor

from . import chat, mixture
from . import tokenizer as bpe
from .batches import Batch, Feed
from .initial import initialise
from .model import CONFIGS, DemoModel
from .place import DEMO, memory


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
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]).view(rows, cols))
                scale = max(1.0, rows / cols) ** 0.5
                for p, u in zip(params, orthogonal(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).add_(u.view(p.shape).to(p.dtype), alpha=-group["lr"] * scale)


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
    parser.add_argument("--minutes", type=float, default=60, help="clock time this schedule takes")
    parser.add_argument("--config", choices=CONFIGS, default="small")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the matrix products; weights stay float32")
    parser.add_argument("--images", type=float, default=0.25, help="share of cases with images")
    parser.add_argument("--budget", type=int, default=6144, help="tokens in a batch")
    parser.add_argument("--longest", type=int, default=1024, help="longer cases are left out")
    parser.add_argument("--lr", type=float, default=0.012, help="of the matrices; the embeddings take a twentieth")
    parser.add_argument("--cooldown", type=float, default=0.3, help="share of the schedule that decays")
    parser.add_argument("--processes", type=int, default=1, help="that share each step; on a CPU one per core beats threads when others work there too")
    parser.add_argument("--workers", type=int, default=0, help="that draw cases; 0 draws them between steps")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> None:
    free = memory()
    if free < 3 << 30:
        fail(f"needs 3 GiB of free memory, found {free / 2**30:.1f}")
    if args.resume and not (args.out / "checkpoint.pt").is_file():
        fail(f"no checkpoint.pt to resume from in {args.out}")
    if not (DEMO / "tokenizer.json").is_file():
        bpe.save(bpe.build(mixture.corpus(1, 30_000)), DEMO, chat.TEMPLATE.read_text())
    args.out.mkdir(parents=True, exist_ok=True)


def main() -> None:
    args = arguments()
    prepare(args)
    if args.processes == 1:
        train(0, args, "")
    else:
        with tempfile.TemporaryDirectory() as meeting:
            multiprocessing.spawn(train, (args, f"file://{meeting}/store"), nprocs=args.processes)


def train(rank: int, args: argparse.Namespace, meeting: str) -> None:
    if meeting:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=args.processes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    torch.manual_seed(args.seed)
    model = DemoModel(CONFIGS[args.config])
    initialise(model, tokenizer)
    step = 0
    checkpoint = args.out / "checkpoint.pt"
    state = torch.load(checkpoint, map_location="cpu", weights_only=True) if args.resume else None
    if state:
        if state["config"] != args.config:
            fail(f"checkpoint is of config {state['config']}, not {args.config}")
        model.load_state_dict(state["model"])
        step = state["step"]
    model.to(device)
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim > 1 and "embed" not in n)]
    optimizers = [Muon(matrices, args.lr), torch.optim.AdamW(rest, args.lr / 20, betas=(0.9, 0.98), weight_decay=0.0)]
    if state and "optimizers" in state:
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    feed = Feed(str(DEMO / "tokenizer.json"), f"{args.seed} {step} {rank}", args.images, args.budget, args.longest)
    loader = iter(torch.utils.data.DataLoader(feed, batch_size=None, num_workers=args.workers, prefetch_factor=8 if args.workers else None))
    began = saved_at = time.monotonic()
    seen, losses, progress, clock = 0, [], 0.0, torch.zeros(())
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    if state:
        average = {name: value.to(device) for name, value in state["average"].items()}
    while progress < 1:
        batch: Batch = next(loader).to(device)
        factor = schedule(progress, step, args.cooldown)
        for optimizer, rate in zip(optimizers, (args.lr, args.lr / 20), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = model(batch.ids, batch.positions, batch.targets, batch.weights, batch.images)
        loss.backward()
        clock = torch.tensor((time.monotonic() - began) / 60 / args.minutes if rank == 0 else 0.0)
        if meeting:
            share([*matrices, *rest], clock, args.processes)
        progress = float(clock)
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(model.parameters()), max(0.005, 1 / (step + 1)))
        seen += batch.ids.numel() * args.processes
        losses.append((batch.images is not None, loss.detach()))
        if rank == 0 and step % 25 == 0:
            report(step, losses, seen, time.monotonic() - began)
            losses = []
        if rank == 0 and time.monotonic() - saved_at > 180:
            save(checkpoint, model, average, optimizers, step, args.config)
            saved_at = time.monotonic()
    if rank == 0:
        save(checkpoint, model, average, optimizers, step, args.config)


def share(params: list[Tensor], clock: Tensor, processes: int) -> None:
    """Average the gradients over the processes; rank 0's clock travels along, so that all stop together."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([*(g.reshape(-1) for g in grads), clock.view(1).to(grads[0])])
    dist.all_reduce(flat)
    clock.copy_(flat[-1])
    at = 0
    for p, g in zip(params, grads, strict=True):
        p.grad = flat[at : at + g.numel()].view_as(g) / processes
        at += g.numel()


def report(step: int, losses: list[tuple[bool, Tensor]], seen: int, seconds: float) -> None:
    text = [x.item() for image, x in losses if not image]
    image = [x.item() for image, x in losses if image]
    both = (sum(group) / len(group) if group else math.nan for group in (text, image))
    print("step {} text {:.4f} image {:.4f}".format(step, *both) + f" tokens {seen / 1e6:.2f}M {seen / seconds:.0f}/s {seconds / 60:.1f} min", flush=True)


def save(path: Path, model: DemoModel, average: dict[str, Tensor], optimizers: list[torch.optim.Optimizer], step: int, config: str) -> None:
    """The checkpoint holds the weights, their running average (what is shipped), and what the optimizers remember."""
    part = path.with_suffix(".part")
    states = [o.state_dict() for o in optimizers]
    torch.save({"model": model.state_dict(), "average": average, "optimizers": states, "step": step, "config": config}, part)
    part.replace(path)


if __name__ == "__main__":
    main()
