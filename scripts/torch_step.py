"""A training step in PyTorch, for comparisons: `python scripts/torch_step.py mlp|gpt one|compiled|ddp|tp`.

The models are those of benches/models. Prints milliseconds of wall time and of processor time of a step, the median of the slowest rank.
`ddp` and `tp` run two processes over gloo, with one thread each.
"""

import os
import queue
import socket
import statistics
import sys
import time


def models():
    import torch
    from torch import nn
    from torch.nn import functional as f

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value, self.out = (nn.Linear(256, 256) for _ in range(4))

        def forward(self, x):
            rows, length, _ = x.shape
            heads = (part(x).view(rows, length, -1, 32).transpose(1, 2) for part in (self.query, self.key, self.value))
            x = f.scaled_dot_product_attention(*heads, is_causal=True)
            return self.out(x.transpose(1, 2).reshape(rows, length, -1))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(256) for _ in range(2))
            self.attention, self.up, self.down = Attention(), nn.Linear(256, 1024), nn.Linear(1024, 256)

        def forward(self, x):
            x = x + self.attention(self.norms[0](x))
            return x + self.down(f.gelu(self.up(self.norms[1](x))))

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(4096, 256), nn.Embedding(128, 256)
            self.blocks = nn.Sequential(*(Block() for _ in range(4)))
            self.norm, self.head = nn.LayerNorm(256), nn.Linear(256, 4096)

        def forward(self, tokens):
            x = self.tokens(tokens) + self.positions(torch.arange(128))
            return self.head(self.norm(self.blocks(x))).flatten(0, 1)

    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(1024, 4096), nn.Linear(4096, 1024)

        def forward(self, x):
            return self.down(f.relu(self.up(x)))

    return Gpt, lambda: nn.Sequential(*(Feed() for _ in range(4)))


def split(model, name):
    """Megatron's plan over the two ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    ends = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    inner = {f"attention.{part}": ColwiseParallel() for part in ("query", "key", "value")}
    inner["attention.out"] = RowwiseParallel()
    for block in model if name == "mlp" else model.blocks:
        parallelize_module(block, mesh, ends if name == "mlp" else {**ends, **inner})
    return model


def steps(rank, name, way, port, results):
    import torch
    from torch.nn import functional as f

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if way in ("ddp", "tp"):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    gpt, mlp = models()
    model = mlp() if name == "mlp" else gpt()
    if name == "mlp":
        loss, inputs, targets = f.mse_loss, torch.randn(32, 1024), torch.randn(32, 1024)
    else:
        loss, inputs, targets = f.cross_entropy, torch.randint(0, 4096, (8, 128)), torch.randint(0, 4096, (1024,))
    if way == "tp":
        model = split(model, name)
    run = model
    if way == "ddp":
        run = torch.nn.parallel.DistributedDataParallel(model)
    if way == "compiled":
        run = torch.compile(model)
    optimizer = (torch.optim.SGD if name == "mlp" else torch.optim.Adam)(model.parameters(), lr=1e-4)
    times = []
    for step in range(9):
        if way in ("ddp", "tp"):
            torch.distributed.barrier()
        began, worked = time.perf_counter(), time.process_time()
        loss(run(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 3:
            times.append((time.perf_counter() - began, time.process_time() - worked))
    results.put([1e3 * statistics.median(column) for column in zip(*times)])
    if way in ("ddp", "tp"):
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in ("mlp", "gpt") or sys.argv[2] not in ("one", "compiled", "ddp", "tp"):
        raise SystemExit(__doc__)
    try:
        import torch.multiprocessing as processes
    except ModuleNotFoundError as missing:
        raise SystemExit(f"torch_step.py: there is no {missing.name}: {sys.executable} -m pip install torch")

    name, way = sys.argv[1:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = processes.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=steps, args=(rank, name, way, port, results)) for rank in range(2 if way in ("ddp", "tp") else 1)]
    for rank in ranks:
        rank.start()
    took, began = [], time.monotonic()
    while len(took) < len(ranks):
        try:
            took.append(results.get(timeout=1))
        except queue.Empty:
            # One that has failed has said why; the others would wait for it.
            if any(rank.exitcode for rank in ranks) or time.monotonic() - began > 600:
                for rank in ranks:
                    rank.kill()
                raise SystemExit("torch_step.py: a process has failed, or takes more than 600 s")
    for rank in ranks:
        rank.join()
    print(*(max(column) for column in zip(*took)))


if __name__ == "__main__":
    main()
