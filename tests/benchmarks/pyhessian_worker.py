"""PyHessian's side of curvature_peers.py, in an environment without JAX: it answers requests.

Each line of standard input is a request in JSON, each line of standard output its answer. The arrays
come in a file: batch, weights of the layers in the order and layout of Flax. Times contain the loss
and its gradient, whose graph PyHessian keeps for all products.
"""

import json
import sys
import time

import numpy as np
import torch
from pyhessian import hessian
from torch import nn


def removed_eig(matrix, eigenvectors):
    """torch.eig, which new versions of torch lack and `density` calls: eigenvalues as [n, 2]."""
    assert eigenvectors
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


def build(arrays):
    layers, modules = int(arrays["layers"]), []
    kernels = [(arrays[f"kernel{i}"], arrays[f"bias{i}"]) for i in range(layers)]
    convolutions = layers - 2  # each network ends with two dense layers
    side, channels = 28, 1
    for i, (kernel, bias) in enumerate(kernels):
        if i < convolutions:  # [9 · in, out], the neighbourhood first
            layer = nn.Conv2d(channels, len(bias), 3, padding=1)
            weight = kernel.reshape(3, 3, channels, -1).transpose(3, 2, 0, 1)
            modules += [layer, nn.ReLU(), nn.MaxPool2d(2)]
            side, channels = side // 2, len(bias)
        else:
            layer, weight = nn.Linear(*kernel.shape), kernel.T
            if i == convolutions:  # flattened here as [channels, height, width]
                modules.append(nn.Flatten())
                weight = kernel.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)
                weight = weight.reshape(kernel.shape[::-1])
            modules += [layer] if i == layers - 1 else [layer, nn.ReLU()]
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
            layer.bias.copy_(torch.from_numpy(bias))
    return nn.Sequential(*modules)


def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key))


def answer(request, problems):
    if request["path"] not in problems:
        arrays = np.load(request["path"])
        x, y = torch.from_numpy(arrays["x"])[:, None], torch.from_numpy(arrays["y"]).long()
        problems[request["path"]] = build(arrays), (x, y)
    model, data = problems[request["path"]]
    torch.manual_seed(request["seed"])
    model.zero_grad(set_to_none=True)
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the high-water mark starts anew
    start = time.perf_counter()
    measured = hessian(model, nn.CrossEntropyLoss(), data=data, cuda=False)
    if request["method"] == "density":
        largest = max(measured.density(iter=request["steps"], n_v=1)[0][0])
    else:
        # A tolerance of 0 never stops it.
        values, _ = measured.eigenvalues(maxIter=request["steps"], tol=request.get("tol", 0.0))
        largest = values[0]
    seconds = time.perf_counter() - start
    return {"largest": float(largest), "seconds": seconds, "MB": memory("VmHWM") - before}


def main():
    torch.set_num_threads(int(sys.argv[1]))
    torch.eig = removed_eig
    problems = {}
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), problems)), flush=True)


if __name__ == "__main__":
    main()
