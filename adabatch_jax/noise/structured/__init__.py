"""Per-example statistics from the structure of a loss, without per-example gradients.

A parameter enters a loss by operations that are linear in it, y = op(x, w). The gradient of one example
by w follows from x and from δ, the derivative of its loss by y; so do norms, squares and inner products.

* `_plan`: reads the jaxpr of one example and finds a way for each parameter.
* `_rules`: what is known of an operation. A new primitive is one more rule.
* `_statistics`: sums over examples, from one backward pass in zero taps, which are added to every y.
* `_batch`: what `value_and_grad_noise` is given.
* `_explain`: the plan in words.
"""
