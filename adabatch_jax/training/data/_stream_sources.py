"""Streams from sources that are read one example after the other: Grain data sets, Python iterables."""

from __future__ import annotations

import abc
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

import jax
import numpy as np

from adabatch_jax._types import PyTree
from adabatch_jax._validate import integer
from adabatch_jax.training.data._stream import Gather, Offsets, Stream

_NUMBERS = "biufcV"  # V: bfloat16 and its like


class _Sequential(Stream):
    """Reads a batch example by example; every process reads all of it and stacks its share."""

    def __init__(self, **shape_and_processes: Any) -> None:
        super().__init__(**shape_and_processes)
        self._layout: Any = None  # of the first example: structure, shapes and dtypes

    @abc.abstractmethod
    def _next(self) -> PyTree:
        """The next example, or StopIteration."""

    def _read(self, length: int) -> tuple[int, Gather]:
        examples: list[list[np.ndarray]] = []
        for _ in range(length):
            try:
                example = self._next()
            except StopIteration:
                break
            examples.append(self._leaves(example))

        def gather(offsets: Offsets) -> PyTree:
            columns = zip(*(examples[i] for i in offsets.reshape(-1)), strict=True)
            stacked = [np.stack(c).reshape(*offsets.shape, *c[0].shape) for c in columns]
            return jax.tree.unflatten(self._layout[0], stacked)

        return len(examples), gather

    def _leaves(self, example: PyTree) -> list[np.ndarray]:
        """The arrays of an example, which must be like the first: shapes are static."""
        name = type(self).__name__
        leaves, structure = jax.tree.flatten(example)
        arrays = [np.array(leaf) for leaf in leaves]  # copies: a source may use its buffer again
        layout = (structure, [(array.shape, array.dtype) for array in arrays])
        if self._layout is None:
            if not arrays or any(array.dtype.kind not in _NUMBERS for array in arrays):
                raise ValueError(f"{name}: an example must be a pytree of numbers, got {example!r}")
            self._layout = layout
        if layout != self._layout:
            raise ValueError(
                f"{name}: every example must be like the first, {_shown(self._layout)}, "
                f"got {_shown(layout)}"
            )
        return arrays


class GrainStream(_Sequential):
    """Any Grain data set of single examples; its own iterator state is saved and restored.

    Shuffling, repeating, filtering and workers are Grain's: `.shuffle(seed)`, `.repeat(n)`,
    `.mp_prefetch(…)`. The stream ends where the data set ends; with `drop_remainder`, what was left
    there is lost. Leave `.batch(…)` out.

    Args:
      dataset: `grain.MapDataset` or `grain.IterDataset`; its elements are pytrees of numbers, all of
        the same structure, shapes and dtypes.
      shape_and_processes: keywords, as for `Stream`. Every process reads the whole data set and keeps
        its share. Where reading is dear, give every process a slice, its part of the batch size, and
        `process_index=0, process_count=1`; positions then count the examples of one process.

    Raises:
      ValueError: `dataset` is not a Grain data set.

    Example:
      >>> import grain
      >>> source = grain.MapDataset.source([1.0, 2.0, 3.0, 4.0, 5.0])
      >>> stream = GrainStream(source, micro_batch_size=2, num_groups=2)
      >>> stream.take(3).groups.tolist()  # the last row repeats an example: sizes are 2 and 1
      [[1.0, 2.0], [3.0, 1.0]]
      >>> saved = stream.state()
      >>> stream.take(2).groups[0].tolist()
      [4.0, 5.0]
      >>> stream.restore(saved)
      >>> stream.take(2).groups[0].tolist()
      [4.0, 5.0]
    """

    def __init__(self, dataset: Any, **shape_and_processes: Any) -> None:
        import grain  # slow to import, and only this stream needs it

        super().__init__(**shape_and_processes)
        if not isinstance(dataset, grain.MapDataset | grain.IterDataset):
            raise ValueError(
                "GrainStream: dataset must be a grain.MapDataset or grain.IterDataset, "
                f"got {type(dataset).__name__}"
            )
        self._dataset = dataset
        self._iterator = iter(dataset)

    def state(self) -> dict[str, Any]:
        """The position, and the state of Grain's iterator, which only the same Grain is sure to read.

        Raises:
          RuntimeError: a `take` failed halfway; the iterator is further than the position.
        """
        self._check_whole()
        # Grain writes this state as JSON itself. A copy, because nested iterators may share parts of it.
        grain_state = copy.deepcopy(self._iterator.get_state())
        return {"stream": "GrainStream", "position": self._position, "grain": grain_state}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where the state was taken.

        Raises:
          ValueError: the state is of another kind of stream.
        """
        (position,) = self._integers(state, "position")
        if "grain" not in state:
            raise ValueError(f"GrainStream: state must have the key 'grain', got {dict(state)!r}")
        # A new one: window shuffling, for one, restores correctly only before its first element.
        iterator = iter(self._dataset)
        iterator.set_state(copy.deepcopy(state["grain"]))
        self._iterator.close()
        self._iterator = iterator
        self._position = position
        self._failed = False

    def _next(self) -> PyTree:
        return next(self._iterator)


class IterableStream(_Sequential):
    """Any Python iterable of examples, or a function that makes one.

    A function without arguments, or a collection, can be read again: for the next epoch, and to
    restore a state by reading on to the same place. It must give the same examples every time. An
    iterator (a generator, say) can be read once, and then `state` and `restore` raise.

    Args:
      source: the iterable, or a function that returns it; its examples are pytrees of numbers, all of
        the same structure, shapes and dtypes.
      epochs: how often it is read before `take` raises StopIteration; None: without end.
      shape_and_processes: keywords, as for `Stream`. Every process reads all examples and keeps its
        share. With `drop_remainder`, what was left at the end is lost.

    Raises:
      ValueError: an argument out of its range; `epochs` of an iterator is not 1.

    Example:
      >>> def examples():
      ...     for i in range(5):
      ...         yield {"x": float(i), "y": i % 2}
      >>> stream = IterableStream(examples, epochs=1, micro_batch_size=2, num_groups=2)
      >>> stream.take(4).groups["x"].tolist()
      [[0.0, 1.0], [2.0, 3.0]]
      >>> batch = stream.take(4)
      >>> batch.sizes.tolist(), batch.groups["x"][0].tolist(), stream.position
      ([1, 0], [4.0, 4.0], 5)
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[], Iterable[Any]],
        *,
        epochs: SupportsIndex | None = 1,
        **shape_and_processes: Any,
    ) -> None:
        super().__init__(**shape_and_processes)
        if not (callable(source) or isinstance(source, Iterable)):
            raise ValueError(
                f"IterableStream: source must be iterable or a function, got {source!r}"
            )
        self._epochs = None if epochs is None else integer("IterableStream", "epochs", epochs, 1)
        self._source = source
        self._once = isinstance(source, Iterator)
        if self._once and self._epochs != 1:
            raise ValueError(
                f"IterableStream: epochs must be 1 for an iterator, got {self._epochs}; give a "
                "function that makes one"
            )
        self._open(epoch=0)
        self._place = 0, 0  # epoch and offset of what was handed out, not of what was read

    def state(self) -> dict[str, Any]:
        """The position, and the same by epoch and examples read in it.

        Raises:
          ValueError: the source is an iterator.
        """
        self._check_rereadable("state")
        epoch, offset = self._place
        return {
            "stream": "IterableStream",
            "position": self._position,
            "epoch": epoch,
            "offset": offset,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Reads on to where the state was taken: the time grows with the place in the epoch.

        Raises:
          ValueError: the source is an iterator, or shorter than it was; the state is of another kind
            of stream.
        """
        self._check_rereadable("restore")
        position, epoch, offset = self._integers(state, "position", "epoch", "offset")
        self._failed = True  # until it is over
        self._open(epoch)
        self._offset = sum(1 for _ in itertools.islice(self._iterator, offset))
        if self._offset < offset:
            raise ValueError(
                f"IterableStream: source has {self._offset} examples, but the state was taken after "
                f"offset={offset} of them"
            )
        self._place = epoch, offset
        self._position = position
        self._failed = False

    def _open(self, epoch: int) -> None:
        source = self._source() if callable(self._source) else self._source
        self._iterator = iter(source)
        self._epoch, self._offset = epoch, 0

    def _advance(self, number: int) -> None:
        super()._advance(number)
        self._place = self._epoch, self._offset

    def _next(self) -> PyTree:
        while self._epochs is None or self._epoch < self._epochs:
            for example in self._iterator:
                self._offset += 1
                return example
            if self._offset == 0:
                raise ValueError(
                    f"IterableStream: source gave no examples in epoch {self._epoch} (a function "
                    "must make a new iterator every time)"
                )
            if self._epochs is not None and self._epoch + 1 == self._epochs:
                break
            self._open(self._epoch + 1)
        raise StopIteration

    def _check_rereadable(self, method: str) -> None:
        if self._once:
            raise ValueError(
                f"IterableStream: {method} needs a source that can be read again, got the iterator "
                f"{self._source!r}; give a function that makes one"
            )


def _shown(layout: Any) -> str:
    structure, arrays = layout
    return str(structure.unflatten([f"{dtype}{list(shape)}" for shape, dtype in arrays]))
