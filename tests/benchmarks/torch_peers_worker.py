"""PyTorch's side of noise_peers.py, in an environment without JAX: it answers requests.

    python tests/benchmarks/torch_peers_worker.py THREADS PROBLEM ARRAYS.npz

The file holds a batch, x and y, and the parameters by the names that they have here. The first line of
standard output lists the methods, in JSON. Then each line of standard input is a request: a list of
methods, timed one after the other, or one method whose memory is measured. Each line of standard output
is the answer.
"""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, BatchL2Grad, Variance
from cockpit import Cockpit
from cockpit.quantities import InnerTest, NormTest
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import nn
from torch.nn import functional

# BackPACK passes over what it does not know, with a warning.
LACKS = r"does not have an extension for Module <class 'torch\.nn\.[\w.]*\.(\w+)'>"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Values = tuple[float, float]  # ‖ḡ‖², and the variance that the test needs


class Block(nn.Module):
    """One of the transformer's blocks, of layers that BackPACK and Opacus see."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = self.norm1(hidden)
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(seen.transpose(1, 2).flatten(2))
        wide = functional.gelu(self.wide(self.norm2(hidden)), approximate="tanh")
        return hidden + self.narrow(wide)


class Transformer(nn.Module):
    """That of the command. The head is a layer which shares its weight with the embedding."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(256, width), nn.Embedding(128, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 256, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        places = places.expand(x.shape)  # with an axis of examples, for Opacus
        return self.head(self.norm(self.blocks(self.embed(x) + self.positions(places))))


def build(problem: str, parameters: dict[str, torch.Tensor]) -> nn.Module:
    if problem == "mlp":
        layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()]
        net: nn.Module = nn.Sequential(*layers, nn.Linear(1024, 10))
    elif problem == "cnn":
        layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        net = nn.Sequential(*layers, nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10))
    else:
        net = Transformer()
    missing = net.load_state_dict(parameters, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"head.weight"}, missing
    return net


def losses_of(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[B]: an example's loss; the mean over the positions of a text."""
    each = functional.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none")
    return each.reshape(len(y), -1).mean(1)


def gradient_norm(net: nn.Module) -> float:
    return float(sum(p.grad.square().sum() for p in net.parameters()))


def from_squares(squares: torch.Tensor, mean: float) -> Values:
    """tr Σ from every ‖gᵢ‖², [B], and ‖ḡ‖², as their users have it."""
    n = len(squares)
    return mean, (float(squares.sum()) - n * mean) / (n - 1)


def from_products(products: torch.Tensor, mean: float) -> Values:
    """The variance of ⟨gᵢ, ḡ⟩, [B]."""
    return mean, float(products.var())


# Each takes a network of its own and the batch, and returns what is timed.
def plain(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        net.zero_grad()
        losses_of(net(x), y).mean().backward()

    return run


def backpack_norms(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Values]:
    extend(net)

    def run() -> Values:
        net.zero_grad()
        with backpack(BatchL2Grad()):
            losses_of(net(x), y).mean().backward()
        squares = sum(p.batch_l2 for p in net.parameters())  # of gᵢ / B
        return from_squares(len(x) ** 2 * squares, gradient_norm(net))

    return run


def backpack_variance(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Values]:
    extend(net)
    n = len(x)

    def run() -> Values:
        net.zero_grad()
        with backpack(Variance()):
            losses_of(net(x), y).sum().backward()  # of a mean, the two terms differ by a factor
        trace = float(sum(p.variance.sum() for p in net.parameters()))  # ddof 0
        for p in net.parameters():
            p.grad /= n
        return gradient_norm(net), trace * n / (n - 1)

    return run


def backpack_products(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Values]:
    extend(net)

    def run() -> Values:
        net.zero_grad()
        with backpack(BatchGrad()):
            losses_of(net(x), y).mean().backward()
        along = sum(p.grad_batch.flatten(1) @ p.grad.flatten() for p in net.parameters())  # gᵢ / B
        for p in net.parameters():
            del p.grad_batch  # a gradient of every example, until the next turn
        return from_products(len(x) * along, gradient_norm(net))

    return run


def of_cockpit(
    kind: type, net: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> Callable[[], Values]:
    extend(net)
    quantity, steps = kind(lambda step: True), count()
    watch = Cockpit(net.parameters(), quantities=[quantity])
    power = 1 if kind is NormTest else 2

    def run() -> Values:
        net.zero_grad()
        step, losses = next(steps), losses_of(net(x), y)
        loss = losses.mean()
        with watch(step, info={"batch_size": len(x), "individual_losses": losses, "loss": loss}):
            loss.backward(create_graph=watch.create_graph(step))
        largest = quantity.get_output()[step]  # θ² = variance / (B ‖ḡ‖²), or / (B ‖ḡ‖⁴)
        mean = gradient_norm(net)
        return mean, largest**2 * len(x) * mean**power

    return run


def opacus_samples(
    products: bool, net: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> Callable[[], Values]:
    wrapped = GradSampleModule(net, loss_reduction="mean")

    def run() -> Values:
        wrapped.zero_grad()
        losses_of(wrapped(x), y).mean().backward()
        pairs = [(p.grad_sample.flatten(1), p.grad.flatten()) for p in net.parameters()]
        mean = gradient_norm(net)
        if products:
            values = from_products(sum(each @ of_all for each, of_all in pairs), mean)
        else:
            values = from_squares(sum(each.norm(dim=1).square() for each, _ in pairs), mean)
        for p in net.parameters():
            p.grad_sample = None
        return values

    return run


def opacus_ghosts(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Values]:
    wrapped = GradSampleModuleFastGradientClipping(
        net, loss_reduction="mean", use_ghost_clipping=True
    )

    def run() -> Values:
        wrapped.zero_grad()
        losses_of(wrapped(x), y).mean().backward()
        return from_squares(wrapped.get_norm_sample().square(), gradient_norm(net))

    return run


def of_torch_func(
    products: bool, net: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> Callable[[], Values]:
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(net, parameters, (x[None],))
        return losses_of(logits, y[None])[0]

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

    def run() -> Values:
        gradients = [g.flatten(1) for g in each(parameters, x, y).values()]
        means = [g.mean(0) for g in gradients]
        mean = float(sum(m.square().sum() for m in means))
        if products:
            pairs = zip(gradients, means, strict=True)
            return from_products(sum(g @ m for g, m in pairs), mean)
        return from_squares(sum(g.norm(dim=1).square() for g in gradients), mean)

    return run


def bound(make: Callable[..., Any], first: Any) -> Callable[..., Any]:
    return lambda *rest: make(first, *rest)


METHODS: dict[str, Callable[..., Callable[[], Any]]] = {
    "plain: PyTorch": plain,
    "norm test: BackPACK, BatchL2Grad": backpack_norms,
    "norm test: BackPACK, Variance": backpack_variance,
    "norm test: Cockpit, NormTest": bound(of_cockpit, NormTest),
    "norm test: Opacus, GradSampleModule": bound(opacus_samples, False),
    "norm test: Opacus, ghost norms": opacus_ghosts,
    "norm test: torch.func, vmap(grad)": bound(of_torch_func, False),
    "inner products: BackPACK, BatchGrad": backpack_products,
    "inner products: Cockpit, InnerTest": bound(of_cockpit, InnerTest),
    "inner products: Opacus, GradSampleModule": bound(opacus_samples, True),
    "inner products: torch.func, vmap(grad)": bound(of_torch_func, True),
}


class Runs:
    """Of every method what is to be timed, made when it is first asked for."""

    def __init__(self, problem: str, path: str) -> None:
        arrays = {name: torch.from_numpy(a).to(DEVICE) for name, a in np.load(path).items()}
        self.x, self.y = arrays.pop("x"), arrays.pop("y").long()
        if problem == "transformer":
            self.x = self.x.long()
        elif problem == "cnn":
            self.x = self.x[:, None]
        self.problem, self.parameters = problem, arrays
        self.made: dict[str, Callable[[], Any]] = {}

    def __call__(self, name: str) -> dict[str, Any]:
        """Seconds and values, or why there are none."""
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always" if name not in self.made else "ignore")
            try:
                if name not in self.made:
                    net = build(self.problem, self.parameters).to(DEVICE)
                    self.made[name] = METHODS[name](net, self.x, self.y)
                wait()
                start = time.perf_counter()
                values = self.made[name]()
                wait()
                return {"seconds": time.perf_counter() - start, "values": values}
            except Exception as error:  # what a peer cannot do is a result
                found = f"{type(error).__name__}: {error}"
                lacks = re.findall(LACKS, " ".join(str(w.message) for w in warned))
        return {"failed": found + "".join(f"; BackPACK knows no {kind}" for kind in {*lacks})}

    def megabytes(self, name: str) -> float:
        """What the peak of the process, or of the GPU, grows by, beyond the gradient."""
        self("plain: PyTorch")  # libraries allot something of their own at the first step
        self.made.clear()
        gradient = sum(a.numel() * a.element_size() for a in self.parameters.values()) / 2**20
        if DEVICE.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self(name)
            return (torch.cuda.max_memory_allocated() - before) / 2**20 - gradient
        before = status("VmRSS")
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")  # the high-water mark starts anew
        self(name)
        return status("VmHWM") - before - gradient


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def status(key: str) -> float:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def answers(runs: Runs) -> Iterator[Any]:
    yield list(METHODS)
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, str):
            yield runs.megabytes(request)
            continue
        runs("plain: PyTorch")  # the first call after a pause finds the caches cold
        yield {name: runs(name) for name in request}


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    torch.backends.cudnn.allow_tf32 = False  # float32 is what is compared, as matrix products are
    out, sys.stdout = sys.stdout, sys.stderr  # what the peers print is no answer
    for answer in answers(Runs(sys.argv[2], sys.argv[3])):
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
