"""Per-example statistics from the structure of a loss, without per-example gradients. Not public.

A parameter enters a loss by operations that are linear in it, y = op(x, w). The gradient of one example
by w follows from x and from δ, the derivative of its loss by y; so do norms, squares and inner products.

* `_plan`: reads the jaxpr of one example and finds a way for each parameter.
* `_rules`: what is known of an operation. A new primitive is one more rule.
* `_statistics`: sums over examples, from one backward pass in zero taps, which are added to every y.
* `_batch`: what a chunk of examples adds up to.
* `_estimate`: `value_and_grad_structured`, the whole.
* `_explain`: the plan in words.

It was to become public if it took at most 1.15 (MLP), 1.6 (CNN) and 1.5 (transformer) plain steps, at most
twice their memory, and a fifth of the time of `vmap(grad)` on each. On two CPU cores, jax 0.10 / 0.12
(`tests/benchmarks/noise_peers.py`):

| | MLP | CNN | transformer |
|---|---|---|---|
| time over a plain step | 1.1 / 1.1 | 1.1 / 0.9 | 1.1 / 1.0 |
| temporary memory over a plain step's | 1.3 | 1.0 | 1.0 |
| `vmap(grad)` over it | 180 / 35 | 4.6 / 2.6 | 1.0 |

The last line is why it is not. `vmap(grad)` takes 5 plain steps on that CNN, and hardly more than one on
the transformer, whose parameters are used 64 times an example: five times faster than that would be
faster than a plain step, which nothing that returns the gradient can be.
"""
