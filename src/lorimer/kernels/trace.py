"""What runs, for how long, and how much work it was: nothing is noted unless a profile asks.

As a rule `recorder` is None, and a kernel's call costs one comparison more. While there is one, each
native kernel's call is noted with its time and work, and each stage (forward, backward, ...) with
its time. Nothing that is computed changes.

Letters: T tokens, H hidden, N query heads, K key/value heads, D head size, M positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter_ns, thread_time_ns
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lorimer.kernels.codes import BLOCKS


@dataclass(frozen=True, slots=True)
class Work:
    """What one call computes, and what it reads and writes when each number moves once."""

    size: str = ""
    flops: float = 0
    bytes: float = 0


class Call(NamedTuple):
    """One call of a kernel. Times are nanoseconds of perf_counter."""

    name: str
    begin: int
    end: int
    own: int  # what noting it took, before and after
    waiting: int  # of it and of that, the calling thread was on no processor
    work: Work


class Stage(NamedTuple):
    """One stretch of Python with a name; stages may lie in one another."""

    name: str
    begin: int
    end: int
    waiting: int
    inner: int  # of it, in the stages that lie in it


class Recording(Protocol):
    """What hears of each kernel's call and makes it: `arguments` are `values` with their tensors."""

    def call(
        self, name: str, function: Callable[..., None], values: Sequence[Any], arguments: Sequence[Any]
    ) -> None: ...

    def stage(self, name: str) -> AbstractContextManager[None]: ...


class Recorder:
    """The calls and stages of one thread, in the order in which they end.

    `mark` puts a stage's name into another profiler's record too.
    """

    def __init__(self, mark: Callable[[str], AbstractContextManager[object]] = nullcontext) -> None:
        self.calls: list[Call] = []
        self.stages: list[Stage] = []
        self._mark = mark
        self._inner: list[int] = []

    def call(
        self, name: str, function: Callable[..., None], values: Sequence[Any], arguments: Sequence[Any]
    ) -> None:
        """Call `function` with `values`; `arguments` are the same with their tensors."""
        called, running = perf_counter_ns(), thread_time_ns()
        begin = perf_counter_ns()
        function(*values)
        end = perf_counter_ns()
        work = WORK[name](*arguments) if name in WORK else Work()
        noted = perf_counter_ns()
        waiting = max(0, noted - called - (thread_time_ns() - running))
        self.calls.append(Call(name, begin, end, begin - called + noted - end, waiting, work))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._inner.append(0)
        begin, running = perf_counter_ns(), thread_time_ns()
        try:
            with self._mark(name):
                yield
        finally:
            end = perf_counter_ns()
            waiting = max(0, end - begin - (thread_time_ns() - running))
            self.stages.append(Stage(name, begin, end, waiting, self._inner.pop()))
            if self._inner:
                self._inner[-1] += end - begin


recorder: Recording | None = None


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A stretch of Python under this name, as `with stage("forward"):` or as a decorator."""
    if recorder is None:
        yield
        return
    with recorder.stage(name):
        yield


def start(mark: Callable[[str], AbstractContextManager[object]] = nullcontext) -> Recorder:
    """Note everything from now on, until `stop`."""
    global recorder
    recorder = Recorder(mark)
    return recorder


def stop() -> None:
    global recorder
    recorder = None


# --- the work of each kernel, from what it is called with -----------------------------------------


def _matmul(
    a: Tensor,
    a_stride: int,
    a_turned: int,
    b: Tensor,
    b_stride: int,
    b_turned: int,
    k: int,
    a2: Tensor | None,
    a2_stride: int,
    b2: Tensor | None,
    b2_stride: int,
    b2_turned: int,
    k2: int,
    bias: Tensor | None,
    onto: Tensor | None,
    onto_stride: int,
    out: Tensor,
    out_stride: int,
    out_floats: int,
    out_turned: int,
    spans: Tensor | None,
    span_count: int,
    m: int,
    n: int,
    *_: float,
) -> Work:
    """Two operations for each number of b and b2 that a span covers, and each row."""
    first, second = n * k, n * k2
    if spans is not None:
        covered = sum(columns * length for _, columns, _, length in spans.tolist())
        first, second = (first, covered) if b2 is not None else (covered, 0)
    small = m * (k + k2) + first + second + (0 if bias is None else n)
    outs = 1 + (onto is not None) + bool(out_turned)
    size = f"{m} x {n} x {k}" + (f" + {k2}" if k2 else "") + (", in part" if spans is not None else "")
    moved = a.element_size() * small + out.element_size() * outs * m * n
    return Work(size, 2 * m * (first + second), moved)


def _head_loss(
    hidden: Tensor,
    stride: int,
    head: Tensor,
    labels: Tensor,
    losses: Tensor,
    grad: Tensor | None,
    positions: int,
    hidden_size: int,
    vocabulary: int,
    *_: float,
) -> Work:
    """The logits, and with a gradient their product with the head."""
    products = 1 if grad is None else 2
    moved = hidden.element_size() * hidden_size * (products * positions + vocabulary) + 12 * positions
    size = f"{positions} x {vocabulary} x {hidden_size}" + ("" if grad is None else ", gradient")
    return Work(size, 2 * products * positions * hidden_size * vocabulary, moved)


def visible_pairs(offsets: Sequence[int], prefix: int, window: int) -> int:
    """How many (query, key) pairs causal attention of a pack sees; a window below 1 is none.

    A token at position p sees min(p + 1, window) keys; a row's first token has position `prefix`.
    """

    def seen(tokens: int) -> int:
        near = tokens if window < 1 else min(tokens, window)
        return near * (near + 1) // 2 + (tokens - near) * near

    rows = sum(seen(prefix + last - first) - seen(prefix) for first, last in pairwise(offsets))
    return seen(prefix) + rows


def _attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    rows: int,
    prefix: int,
    heads: int,
    kv_heads: int,
    size: int,
    *rest: float,
) -> Work:
    """Two products: the scores, and their sums of values."""
    tokens, pairs = query.shape[0], visible_pairs(offsets.tolist(), prefix, int(rest[3]))
    moved = tokens * (query.element_size() * 2 * (heads + kv_heads) * size + 4 * heads)
    return Work(f"{tokens} tokens, {rows} rows, {pairs} pairs", 4 * heads * size * pairs, moved)


def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    offsets: Tensor,
    rows: int,
    prefix: int,
    heads: int,
    kv_heads: int,
    size: int,
    *rest: float,
) -> Work:
    """Five products: the scores again, their gradient, and those of query, key and value."""
    tokens, pairs = query.shape[0], visible_pairs(offsets.tolist(), prefix, int(rest[4]))
    moved = tokens * (query.element_size() * 4 * (heads + kv_heads) * size + 4 * heads)
    return Work(f"{tokens} tokens, {rows} rows, {pairs} pairs", 10 * heads * size * pairs, moved)


def _attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lengths: Tensor,
    batch: int,
    capacity: int,
    heads: int,
    kv_heads: int,
    size: int,
    stride: int,
    scale: float,
    window: int,
    *_: float,
) -> Work:
    pairs = sum(length if window < 1 else min(length, window) for length in lengths.tolist())
    moved = query.element_size() * 2 * size * (batch * heads + kv_heads * pairs)
    return Work(f"{batch} rows, {pairs} pairs", 4 * heads * size * pairs, moved)


def _cache_append(key: Tensor, value: Tensor, *_: Any) -> Work:
    """Read once and written once."""
    return Work(_shape(key), 0, 2 * (_bytes(key) + _bytes(value)))


def _rotate(
    states: Tensor,
    stride: int,
    cos: Tensor,
    sin: Tensor,
    floats: int,
    out: Tensor,
    *_: float,
) -> Work:
    """In place only the features that turn are touched."""
    features, turning = states.shape[-1], 2 * cos.shape[-1]
    share = turning / features if out.data_ptr() == states.data_ptr() else 1
    return Work(_shape(states), 0, 2 * share * _bytes(states) + _bytes(cos) + _bytes(sin))


def _all_once(*arguments: Any) -> Work:
    """Every tensor read or written once."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    return Work(_shape(tensors[0]), 0, sum(_bytes(tensor) for tensor in tensors))


def _adamw(*arguments: Any) -> Work:
    """Parameters, gradients and both moments are read and written."""
    return Work(_shape(arguments[0]), 0, 2 * _all_once(*arguments).bytes)


def _scaled_copies(places: Tensor, scales: Tensor, count: int, narrow: int, *_: int) -> Work:
    numbers = sum(rows * columns for _, _, rows, columns, _ in places.tolist())
    return Work(f"{count} matrices", 0, numbers * (6 if narrow else 8))


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _shape(tensor: Tensor) -> str:
    return " x ".join(str(size) for size in tensor.shape)


def _stored(parts: Tensor) -> int:
    """The bytes of a quantised weight's codes, from the words that describe it (see quantised.hpp)."""
    bytes_of = [(1, 2), (1, 1), *BLOCKS.values()]
    total = 0
    for kind, rows, columns in parts[:, :3].tolist():
        size, numbers = bytes_of[kind]
        total += rows * columns * size // numbers
    return total


def _quantised_matmul(
    a: Tensor,
    a_stride: int,
    parts: Tensor,
    part_count: int,
    turned: int,
    k: int,
    a2: Tensor | None,
    a2_stride: int,
    b2: Tensor | None,
    b2_stride: int,
    b2_turned: int,
    k2: int,
    bias: Tensor | None,
    onto: Tensor | None,
    onto_stride: int,
    out: Tensor,
    out_stride: int,
    out_floats: int,
    spans: Tensor | None,
    span_count: int,
    m: int,
    n: int,
    *_: float,
) -> Work:
    """As a dense product, but the weight moves as it is stored."""
    second = n * k2 if spans is None else sum(width * depth for _, width, _, depth in spans.tolist())
    moved = a.element_size() * (m * (k + k2) + second) + out.element_size() * m * n + _stored(parts)
    return Work(f"{m} x {n} x {k}", 2 * m * (n * k + second), moved)


def _quantised_head_loss(
    hidden: Tensor,
    stride: int,
    parts: Tensor,
    part_count: int,
    labels: Tensor,
    losses: Tensor,
    grad: Tensor | None,
    positions: int,
    hidden_size: int,
    vocabulary: int,
    *_: float,
) -> Work:
    products = 1 if grad is None else 2
    moved = hidden.element_size() * hidden_size * products * positions + _stored(parts) + 12 * positions
    size = f"{positions} x {vocabulary} x {hidden_size}" + ("" if grad is None else ", gradient")
    return Work(size, 2 * products * positions * hidden_size * vocabulary, moved)


def _quantised_rows(
    parts: Tensor,
    part_count: int,
    ids: Tensor | None,
    first: int,
    count: int,
    columns: int,
    out: Tensor,
    *_: float,
) -> Work:
    return Work(f"{count} x {columns}", 0, out.element_size() * count * columns)


def _quantise_blocks(
    numbers: Tensor, kind: int, count: int, block_size: int, borders: Tensor, order: Tensor, *out: Any
) -> Work:
    return Work(f"{count}", 0, _bytes(numbers) + sum(_bytes(tensor) for tensor in out[:2]))


def _quantise_scales(
    scales: Tensor, count: int, offset: float, nearest: Tensor, codes: Tensor, largest: Tensor, *_: int
) -> Work:
    return Work(f"{count}", 0, sum(_bytes(tensor) for tensor in (scales, codes, largest)))


def _column_maxima(numbers: Tensor, *_: Any) -> Work:
    return Work(_shape(numbers), 0, _bytes(numbers))


def _quantise_int8(
    numbers: Tensor, kind: int, rows: int, columns: int, wild: Tensor, count: int, *out: Any
) -> Work:
    return Work(_shape(numbers), 0, _bytes(numbers) + sum(_bytes(tensor) for tensor in out[:3]))


WORK: dict[str, Callable[..., Work]] = {
    "quantised_matmul": _quantised_matmul,
    "quantised_head_loss": _quantised_head_loss,
    "quantised_rows": _quantised_rows,
    "quantise_blocks": _quantise_blocks,
    "quantise_scales": _quantise_scales,
    "column_maxima": _column_maxima,
    "quantise_int8": _quantise_int8,
    "matmul": _matmul,
    "head_loss": _head_loss,
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "attention_decode": _attention_decode,
    "cache_append": _cache_append,
    "rms_norm": _all_once,
    "rms_norm_apply": _all_once,
    "rms_norm_backward": _all_once,
    "query_key_norm": _all_once,
    "query_key_norm_backward": _all_once,
    "layer_norm": _all_once,
    "layer_norm_apply": _all_once,
    "layer_norm_backward": _all_once,
    "rotate": _rotate,
    "gated": _all_once,
    "gated_backward": _all_once,
    "activate": _all_once,
    "activate_backward": _all_once,
    "add_scaled": _all_once,
    "adamw": _adamw,
    "squared_norm": _all_once,
    "scaled_copies": _scaled_copies,
    "column_sums": _all_once,
}
