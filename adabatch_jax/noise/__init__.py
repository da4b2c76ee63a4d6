"""How noisy is this gradient?

A batch is a set of groups, each with its mean gradient. One result type, `GradientNoise`, holds the
overall mean and the scatter of the groups around it, whichever way the groups came about: single
examples, micro-batches that accumulation makes anyway, devices. `merge_noise` joins two of them.

* `value_and_grad_noise` takes the gradient of a loss over groups and measures the noise on the way.
* `split_groups` cuts a batch into groups.
"""

from adabatch_jax.noise._estimate import value_and_grad_noise
from adabatch_jax.noise._gradient_noise import GradientNoise, merge_noise
from adabatch_jax.noise._groups import split_groups

__all__ = ["GradientNoise", "merge_noise", "split_groups", "value_and_grad_noise"]
