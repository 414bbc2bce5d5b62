"""A LoRA layer's products, native and in PyTorch: one meaning.

Operands are small whole numbers, so float32 is exact and bf16 is rounded once by the native products;
their twins round in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lorimer.kernels import products
from lorimer.kernels.native import library
from lorimer.kernels.products import LowRank
from product_cases import BF16, FP32, same, whole, within

# What a twin may be off by, of the largest value: bf16 rounds the sum, then the sum with LoRA's part.
CLOSE = {FP32: 0.0, BF16: 2.0**-6}


@pytest.fixture(params=library.available(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with library.using(request.param):
        yield request.param
    torch.set_num_threads(before)


@dataclass
class Layer:
    """Outputs of unequal rows that share an input; `ranks` of 0 has no adapter."""

    tokens: int
    inputs: int
    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.tokens)
        outputs, rank = sum(self.rows), sum(self.ranks)
        self.states, self.weight = (
            whole(generator, self.tokens, self.inputs),
            whole(generator, outputs, self.inputs),
        )
        self.bias, self.onto = whole(generator, outputs), whole(generator, self.tokens, outputs)
        self.grad, self.a = whole(generator, self.tokens, outputs), whole(generator, rank, self.inputs)
        self.down, self.grad_down = whole(generator, self.tokens, rank), whole(generator, self.tokens, rank)
        self.b, self.up, spans = [], torch.zeros(outputs, rank), []
        row = first = 0
        for rows, ranks in zip(self.rows, self.ranks, strict=True):
            if ranks:
                scale = [0.5, 2.0][len(spans) % 2]
                self.b.append(whole(generator, rows, ranks))
                self.up[row : row + rows, first : first + ranks] = scale * self.b[-1]
                spans.append((row, rows, first, ranks, scale))
            row, first = row + rows, first + ranks
        self.spans = tuple(spans)

    def low_rank(self) -> LowRank:
        return LowRank(self.a.to(self.dtype), self.up.to(self.dtype), self.spans)

    def lies(self, values: Tensor) -> Tensor:
        return within(values.to(self.dtype))[0]


# As q, k and v; one output; gate and up, where the first is not adapted.
SHAPES = [
    (37, (19, 8, 13), (2, 5, 3)),
    (64, (96,), (16,)),
    (33, (40, 40), (0, 9)),
    (130, (65, 64, 31), (16, 0, 1)),
]


@pytest.fixture(params=[FP32, BF16])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=SHAPES, ids=str)
def layers(request: pytest.FixtureRequest, dtype: torch.dtype) -> list[Layer]:
    return [Layer(tokens, *request.param, dtype) for tokens in (1, 2, 9, 70)]


def check(product: Callable[[], Tensor], exact: Tensor) -> None:
    mine = product()
    assert same(mine, exact.to(mine.dtype))
    with library.using("reference"):
        twin = product()
    assert twin.dtype == mine.dtype
    assert float((mine.double() - twin.double()).abs().max()) <= CLOSE[mine.dtype] * float(
        exact.abs().max()
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("onto", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_forward(layers: list[Layer], bias: bool, onto: bool, adapted: bool) -> None:
    for layer in layers:
        exact = layer.states.double() @ layer.weight.double().t()
        exact += layer.bias if bias else 0
        exact += layer.onto if onto else 0
        exact += layer.down.double() @ layer.up.double().t() if adapted else 0
        states, weight = layer.lies(layer.states), layer.weight.to(layer.dtype)

        def product(layer: Layer = layer, states: Tensor = states, weight: Tensor = weight) -> Tensor:
            return products.forward(
                *(states, weight),
                bias_O=layer.bias.to(layer.dtype) if bias else None,
                onto_TO=layer.lies(layer.onto) if onto else None,
                low_rank=layer.low_rank() if adapted else None,
                down_TR=layer.lies(layer.down) if adapted else None,
            )

        check(product, exact)


def test_input_grad(layers: list[Layer]) -> None:
    for layer in layers:
        plain = layer.grad.double() @ layer.weight.double()
        grad, weight, low_rank = layer.lies(layer.grad), layer.weight.to(layer.dtype), layer.low_rank()
        grad_down = layer.lies(layer.grad_down)
        with_lora = plain + layer.grad_down.double() @ layer.a.double()
        for given, exact in (
            ((None, None), plain),
            ((low_rank, None), plain),
            ((low_rank, grad_down), with_lora),
        ):
            low, down = given
            check(lambda: products.input_grad(grad, weight, low_rank=low, grad_down_TR=down), exact)  # noqa: B023


def test_down_and_its_gradient(layers: list[Layer]) -> None:
    for layer in layers:
        low_rank, states, grad = layer.low_rank(), layer.lies(layer.states), layer.lies(layer.grad)
        check(lambda: products.down(states, low_rank), layer.states.double() @ layer.a.double().t())  # noqa: B023
        check(lambda: products.down_grad(grad, low_rank), layer.grad.double() @ layer.up.double())  # noqa: B023


def exact_factor_grads(layer: Layer) -> list[Tensor]:
    exact = [layer.grad_down.double().t() @ layer.states.double()]
    for row, rows, rank, ranks, scale in layer.spans:
        part = layer.grad[:, row : row + rows].double().t() @ layer.down[:, rank : rank + ranks].double()
        exact.append(part * scale)
    return exact


@pytest.mark.parametrize("own", ["none", "contiguous", "in pieces"])
def test_factor_grads(layers: list[Layer], own: str) -> None:
    """Returned to autograd, or added to a factor's own gradient where that lies in one piece."""
    for layer in layers:
        factors = [torch.zeros_like(factor) for factor in (layer.a, *layer.b)]
        for i, factor in enumerate(factors):
            if own == "contiguous":
                factor.grad = torch.full_like(factor, float(i + 1))
            elif own == "in pieces":
                factor.grad = torch.full((*factor.shape, 2), float(i + 1))[..., 0]
        given = products.factor_grads(
            *(layer.low_rank(), layer.lies(layer.states), layer.lies(layer.down)),
            *(layer.lies(layer.grad_down), layer.lies(layer.grad), factors),
        )
        for i, (mine, factor, exact) in enumerate(
            zip(given, factors, exact_factor_grads(layer), strict=True)
        ):
            if own == "contiguous":
                assert mine is None
                assert factor.grad is not None
                assert torch.equal(factor.grad.double(), exact + (i + 1))
                continue
            assert mine is not None
            assert mine.dtype == FP32
            assert torch.equal(mine.double(), exact)
            assert factor.grad is None or bool((factor.grad == i + 1).all())
        if own != "none":
            continue
        with library.using("reference"):
            twins = products.factor_grads(
                *(layer.low_rank(), layer.lies(layer.states), layer.lies(layer.down)),
                *(layer.lies(layer.grad_down), layer.lies(layer.grad), factors),
            )
        for mine, twin in zip(given, twins, strict=True):
            assert mine is not None
            assert twin is not None
            assert float((mine - twin).abs().max()) <= CLOSE[layer.dtype] * float(mine.abs().max())
