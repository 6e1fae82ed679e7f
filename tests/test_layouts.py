"""Every tensor argument of every operation in every layout: what comes out, and every gradient,
is that of contiguous copies.

The memory around a tensor and between its elements is poisoned (NaN, ids out of range, the opposite
bool), so that a kernel that reads outside of it shows.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import math
import mmap
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from operation_cases import CASES, Case, evaluated, missing
from torch import Tensor

import fasttransformer as ft
from contract import RUNNABLE, On, running_on

MARGIN = 67  # elements of poison on either side of a tensor: odd, so that it is not aligned


def poison(x: Tensor) -> Any:
    if x.dtype == torch.bool:
        return True
    if x.is_floating_point():
        return float("nan")
    return 2**30 + 7


def placed(x: Tensor, strides: list[int], margin: int = MARGIN) -> Tensor:
    """The numbers of ``x`` in poisoned memory, at the given strides."""
    span = sum((size - 1) * step for size, step in zip(x.shape, strides)) + 1 if x.numel() else 0
    memory = torch.full((span + 2 * margin,), poison(x), dtype=x.dtype)
    if x.dtype == torch.bool and x.numel():  # the opposite of what stands before it
        memory[:] = ~x.flatten()[0]
    return memory.as_strided(x.shape, strides, margin).copy_(x)


def dense(sizes: tuple[int, ...], order: tuple[int, ...], last: int = 1) -> list[int]:
    """The strides of a tensor whose dimensions lie in memory in ``order``, outermost first."""
    strides, step = [0] * len(sizes), last
    for d in reversed(order):
        strides[d] = step
        step *= max(1, sizes[d])
    return strides


def in_order(x: Tensor, order: tuple[int, ...], last: int = 1, margin: int = MARGIN) -> Tensor:
    return placed(x, dense(tuple(x.shape), order, last), margin)


def forwards(x: Tensor) -> tuple[int, ...]:
    return tuple(range(x.dim()))


def expanded(x: Tensor, *dims: int) -> Tensor:
    """The first entry along ``dims``, expanded."""
    small = x
    for d in dims:
        small = small.narrow(d, 0, min(1, x.shape[d]))
    return in_order(small, forwards(x)).expand(x.shape)


def rows_apart(x: Tensor) -> Tensor:
    """As a slice of the first columns of a wider matrix."""
    strides, step = [0] * x.dim(), 1
    for d in reversed(range(x.dim())):
        strides[d] = step
        step = step * max(1, x.shape[d]) + 3
    return placed(x, strides)


def odd_ones(x: Tensor) -> Tensor:
    """Contiguous, but for the strides of dimensions of size 1, which mean nothing."""
    strides = dense(tuple(x.shape), forwards(x))
    odd = itertools.cycle((5, 0, 2**40 + 1))
    return in_order(x, forwards(x)).as_strided(
        x.shape, [next(odd) if n == 1 else step for n, step in zip(x.shape, strides)], MARGIN
    )


def negated(x: Tensor) -> Tensor:
    """A view whose sign torch flips when it is read, as of the imaginary part of a conjugate."""
    return torch._neg_view(-x) if x.is_floating_point() else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second element": lambda x: in_order(x, forwards(x), 2),
    "a column of a matrix": lambda x: in_order(x, forwards(x), 5),
    "off by one element": lambda x: in_order(x, forwards(x), 1, 65),
    "rows apart": rows_apart,
    "transposed": lambda x: in_order(x, forwards(x)[::-1]),
    "first dimension last": lambda x: in_order(x, (*forwards(x)[1:], 0)),
    "middle dimensions swapped": lambda x: in_order(x, (0, *forwards(x)[1:-1][::-1], x.dim() - 1)),
    "odd strides of size 1": odd_ones,
    "sign flipped when read": negated,
    "one number": lambda x: expanded(x, *forwards(x)),
    **{f"expanded in {d}": lambda x, d=d: expanded(x, d) for d in range(4)},
}
EXPANDED = [name for name in LAYOUTS if name.startswith("expanded")]
#: Layouts in which a tensor's numbers are not what they were.
OTHER_NUMBERS = {"one number", *EXPANDED}


def layouts_of(x: Tensor, kind: str = "float", written: bool = False) -> Iterator[str]:
    """The names of the layouts that make sense for a tensor, each of another shape in memory."""
    seen = {(x.stride(), x.storage_offset() % 2)}
    for name, layout in LAYOUTS.items():
        if written and name not in ("off by one element", "rows apart", "odd strides of size 1",
                                    "middle dimensions swapped"):  # fmt: skip
            continue  # a cache is written in place, and refuses others
        if name in EXPANDED and (int(name[-1]) >= x.dim() or x.shape[int(name[-1])] == 1):
            continue
        if kind == "bounds" and name in OTHER_NUMBERS:
            continue  # boundaries rise
        if x.dim() == 0 and name != "off by one element":
            continue
        if name == "sign flipped when read":
            if x.is_floating_point():
                yield name
            continue
        view = layout(x)
        where = (view.stride(), view.storage_offset() % 2)
        if where not in seen:
            seen.add(where)
            yield name


def contiguous(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


class Run:
    """The outputs of a case and its gradients, by name."""

    def __init__(
        self,
        case: Case,
        on: str,
        n: Mapping[str, int],
        tensors: Mapping[str, Tensor],
        cotangent: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        leaves: dict[int, Tensor] = {}  # a tensor that is given twice is one leaf
        given = {}
        for path, x in tensors.items():
            wanted = x.is_floating_point() and case.wants_grad(path, on)
            leaf = leaves.setdefault(id(x), x.detach().requires_grad_(wanted))
            given[path] = leaf
        outs = case.call(given, n)
        self.found = {f"output {i}": out.detach() for i, out in enumerate(outs)}
        named = {path: x for path, x in given.items() if x.requires_grad}
        grown = [out for out in outs if out.requires_grad]
        if not named or not grown:
            return
        generator = torch.Generator().manual_seed(7)
        upstream = [cotangent(torch.randn(o.shape, generator=generator).to(o.dtype)) for o in grown]
        grads = torch.autograd.grad(grown, list(named.values()), upstream, allow_unused=True)
        self.found |= {f"gradient of {path}": g for path, g in zip(named, grads) if g is not None}


def differences(got: Run, want: Run, tolerance: float = 0.0) -> list[str]:
    """What differs: in one bit, or by more than ``tolerance``."""
    wrong = []
    for name, expected in want.found.items():
        x = got.found.get(name)
        if x is None or x.shape != expected.shape:
            wrong.append(f"{name}: shape {None if x is None else tuple(x.shape)}")
            continue
        x, expected = x.double(), expected.double()
        finite = expected[expected.isfinite()]
        allowed = tolerance * max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
        if not torch.allclose(x, expected, rtol=0.0, atol=allowed, equal_nan=True):
            error = (x - expected)[x != expected].abs().max().item()
            wrong.append(f"{name}: off by {error:.2g}")
    return wrong


def test_every_tensor_argument_stands_in_a_case():
    assert missing() == []


class Comparison:
    """Calls of a case in other layouts next to those of contiguous copies, at one set of sizes."""

    def __init__(self, case: Case, on: str, n: Mapping[str, int], dtype: torch.dtype) -> None:
        self.case, self.on, self.n, self.dtype = case, on, n, dtype
        self.base = self.fresh()
        self.layouts = {
            path: list(layouts_of(self.base[path], argument.kind, argument.written))
            for path, argument in case.arguments.items()
        }
        self.plain = self.run(self.fresh())
        self.calls = 0
        self.wrong: list[str] = []

    def fresh(self) -> dict[str, Tensor]:
        return self.case.tensors(self.n, self.dtype)

    def run(self, tensors: Mapping[str, Tensor], **how: Any) -> Run:
        return Run(self.case, self.on, self.n, tensors, **how)

    def note(self, what: str, wrong: list[str]) -> None:
        self.calls += 1
        self.wrong += [f"{dict(self.n)}, {str(self.dtype)[6:]}, {what}: {w}" for w in wrong]

    def laid_out(self, what: str, layouts: Mapping[str, str]) -> None:
        """With the arguments in the given layouts, by path."""
        views = {path: LAYOUTS[name](self.base[path]) for path, name in layouts.items()}
        tensors, used = {**self.fresh(), **views}, {*layouts.values()}
        want = self.plain
        if used & OTHER_NUMBERS:
            want = self.run({path: contiguous(x) for path, x in {**self.fresh(), **views}.items()})
        # torch's own products and sums have another order in another layout, and CUDA's where a
        # row is not aligned; and torch flips signs in a copy that is no longer expanded.
        exact = self.on.startswith(("cpu", "triton")) and "sign flipped when read" not in used
        self.note(what, differences(self.run(tensors), want, 0.0 if exact else 1e-5))

    def all_in(self, layout: str) -> None:
        paths = {path: layout for path, able in self.layouts.items() if layout in able}
        if len(paths) > 1:
            self.laid_out(f"all {layout}", paths)

    def mixed(self) -> None:
        """Each argument in another layout."""
        able = {path: names for path, names in self.layouts.items() if names}
        chosen = {path: names[(3 * i + 1) % len(names)] for i, (path, names) in
                  enumerate(able.items())}  # fmt: skip
        self.laid_out(", ".join(f"{path} {name}" for path, name in chosen.items()), chosen)

    def cotangents(self, layout: str) -> None:
        """With the upstream gradients in a layout."""

        def view(x: Tensor) -> Tensor:
            return LAYOUTS[layout](x) if layout in layouts_of(x) else x

        got = self.run(self.fresh(), cotangent=view)
        want = self.run(self.fresh(), cotangent=lambda x: contiguous(view(x)))
        self.note(f"what comes back {layout}", differences(got, want, 1e-5))

    def exact(self) -> None:
        """The contiguous call itself against float64, by the error of plain torch in float32.

        Within a factor of 10: this is about layouts, other tests hold the precision.
        """
        with ft.use_backend("torch"):
            want = self.run(self.case.tensors(self.n, torch.float64))
            peer = self.run(self.fresh())
        for name, expected in want.found.items():
            error, own = (
                (run.found[name].double() - expected)[expected.isfinite()].abs().max().item()
                if expected.isfinite().any()
                else 0.0
                for run in (self.plain, peer)
            )
            close = error <= 10 * own + 1e-5
            self.note(f"contiguous, {name}", [] if close else [f"off by {error:.2g} of float64"])


def compared(
    case: Case, on: str, dtype: torch.dtype = torch.float32, step: int = 1
) -> tuple[int, list[str]]:
    """Compares calls over every layout of each argument, of all of them, and of what comes back;
    then with each size in turn at 1, of the arguments that have it, and every two of them.

    Of the sizes of 1 and the latter one call in ``step`` is made. Returns how many were compared,
    and what differed.
    """
    turn, comparisons = itertools.count(), []
    singles = [(), *((name,) for name in case.can_be_one())]
    for ones in singles:
        comparison = Comparison(case, on, case.sizes(*ones), dtype)
        comparisons.append(comparison)
        if dtype == torch.float32:
            comparison.exact()
        for path, argument in case.arguments.items():
            if ones and ones[0] not in argument.shape.replace("*", " ").split():
                continue
            for layout in comparison.layouts[path]:
                if not ones or next(turn) % step == 0:
                    comparison.laid_out(f"{path} {layout}", {path: layout})
        for layout in LAYOUTS:
            if next(turn) % step == 0:
                comparison.all_in(layout)
            if not ones:
                comparison.cotangents(layout)
    for ones in itertools.combinations(case.can_be_one(), 2):
        if next(turn) % step == 0 or step == 2:
            comparison = Comparison(case, on, case.sizes(*ones), dtype)
            comparisons.append(comparison)
            comparison.exact()
            comparison.mixed()
    return sum(c.calls for c in comparisons), [wrong for c in comparisons for wrong in c.wrong]


def pairs(*backends: str) -> Any:
    found = [(case, on) for case in CASES for on in case.backends() if on in backends]
    ids = [f"{case.id}, {on}" for case, on in found]
    return pytest.mark.parametrize(("case", "backend"), found, ids=ids)


CPU = [on for on in RUNNABLE if on.startswith("cpu:")]


@pairs(*CPU[-1:])
def test_equal_to_contiguous_copies(case: Case, backend: On):
    with running_on(backend):
        count, wrong = compared(case, backend, step=2)
    assert count > 50
    assert not wrong, "\n".join(wrong)


@pairs(*CPU[-1:])
def test_16_bits_equal_to_contiguous_copies(case: Case, backend: On):
    """16-bit elements lie off by less than what a load takes."""
    for dtype in (torch.bfloat16, torch.float16):
        with running_on(backend):
            comparison = Comparison(case, backend, case.n, dtype)
            for layout in LAYOUTS:
                comparison.all_in(layout)
            comparison.mixed()
        assert not comparison.wrong, "\n".join(comparison.wrong)


@pairs("torch", *CPU[:-1], *(on for on in RUNNABLE if not on.startswith(("cpu", "torch"))))
def test_some_equal_to_contiguous_copies(case: Case, backend: On, request):
    """Elsewhere the front is the same: every argument strided, and each in a layout of its own."""
    if request.config.getoption("--all"):
        with running_on(backend):
            assert not compared(case, backend)[1]
        return
    slow = backend == "triton" and "attention" in case.op and case.op != "merge_attention"
    with running_on(backend):
        comparison = Comparison(case, backend, case.n, torch.float32)
        comparison.all_in("every second element")
        if not slow:  # in the interpreter, seconds for each call
            comparison.mixed()
        for layout in LAYOUTS if backend == "torch" else ():
            comparison.all_in(layout)
    assert not comparison.wrong, "\n".join(comparison.wrong)


#: Strides 0 and 1, of whole rows, and of columns: where there is nothing, any of them may stand.
OF_ZERO = ["one number", "expanded in 0", "transposed", "rows apart", "every second element"]


@pairs("torch", *CPU[-1:])
def test_sizes_of_zero_in_other_layouts(case: Case, backend: On):
    """Each size in turn at 0: the same shapes and numbers as contiguous copies, or the same
    refusal."""

    def outcome(n: Mapping[str, int], tensors: Mapping[str, Tensor]) -> Run | str:
        try:
            return Run(case, backend, n, tensors)
        except ValueError as error:
            return type(error).__name__

    wrong, ran = [], 0
    for name in case.n:
        n = {**case.n, name: 0, **dict.fromkeys(case.bound.get(name, "").split(), 0)}
        if any(a.below and not evaluated(a.below, n) and a.kind == "ids" and math.prod(a.sizes(n))
               for a in case.arguments.values()):  # fmt: skip
            continue  # there are no such ids
        for layout in OF_ZERO:
            views = {}
            for path, x in case.tensors(n).items():
                able = layouts_of(x, case.arguments[path].kind, case.arguments[path].written)
                views[path] = LAYOUTS[layout](x) if layout in able else x
            with running_on(backend, launched=None):
                want = outcome(n, {path: contiguous(x) for path, x in views.items()})
                got = outcome(n, views)
            ran += isinstance(want, Run)
            if isinstance(got, str) or isinstance(want, str):
                differ = [] if got == want else [f"{got} for {want}"]
            else:
                differ = differences(got, want, 1e-5)
            wrong += [f"{name} 0, {layout}: {w}" for w in differ]
    assert ran > 4
    assert not wrong, "\n".join(wrong)


def shared(case: Case, on: str, n: Mapping[str, int]) -> list[list[str]]:
    """Groups of arguments that may be one and the same tensor at these sizes."""
    groups: dict[Any, list[str]] = {}
    for path, argument in case.arguments.items():
        if not argument.written:
            below = argument.below and n.get(argument.below, 0)
            key = (argument.sizes(n), argument.kind, below, case.wants_grad(path, on))
            groups.setdefault(key, []).append(path)
    return [group for group in groups.values() if len(group) > 1]


@pairs("torch", *CPU[-1:])
def test_one_tensor_given_twice(case: Case, backend: On):
    """Its gradient is the sum of those of copies."""
    n = case.all_equal()
    groups = shared(case, backend, n)
    if not groups:
        pytest.skip("no two arguments of one shape")
    with running_on(backend):
        for group in groups:
            one = case.tensors(n)[group[0]]
            copies = {path: one.clone() for path in group}
            got = Run(case, backend, n, {**case.tensors(n), **dict.fromkeys(group, one)})
            want = Run(case, backend, n, {**case.tensors(n), **copies})
            parts = [g for path in group if (g := want.found.pop(f"gradient of {path}", None))
                     is not None]  # fmt: skip
            given = [g for path in group if (g := got.found.pop(f"gradient of {path}", None))
                     is not None]  # fmt: skip
            assert not differences(got, want), group
            assert bool(given) == bool(parts)
            for gradient in given:
                torch.testing.assert_close(gradient, sum(parts))


@pairs("torch", *CPU[-1:])
def test_float64_next_to_float32(case: Case, backend: On):
    """Where an argument may have any dtype it is the same numbers; elsewhere it is refused."""
    tensors = case.tensors(case.n)
    floats = [path for path, argument in case.arguments.items()
              if tensors[path].is_floating_point() and not argument.written]  # fmt: skip
    free = [path for path in floats if case.arguments[path].any_float]
    bound = [path for path in floats if not case.arguments[path].any_float]
    with running_on(backend, launched=None):
        plain = Run(case, backend, case.n, case.tensors(case.n))
        for path in free:
            given = {**case.tensors(case.n), path: tensors[path].double()}
            got = Run(case, backend, case.n, given)
            gradient = got.found.get(f"gradient of {path}")
            assert gradient is None or gradient.dtype == torch.float64
            assert not differences(got, plain, 1e-6), path
        for path in bound if len(bound) > 1 else ():
            with pytest.raises(TypeError, match=f"^{case.op}: .*dtype"):
                case.call({**tensors, path: tensors[path].double()}, case.n)


# ---- memory that ends where a tensor ends -----------------------------------------------------


def guarded(view: Tensor, at_end: bool) -> Tensor:
    """The same layout in memory of its own, where to read past its last element (or before its
    first one) ends the process."""
    span = sum((size - 1) * step for size, step in zip(view.shape, view.stride())) + 1
    if view.is_neg() or not view.numel() or span > 1 << 20:
        return view
    page, width = mmap.PAGESIZE, view.element_size()
    room = -(-span * width // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (begin, begin + page + room):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), page, 0) == 0
    offset = page + (room - span * width if at_end else 0)
    flat = torch.frombuffer(memory, dtype=view.dtype, count=span, offset=offset)
    flat.copy_(view.as_strided((span,), (1,), view.storage_offset()))
    return flat.as_strided(view.shape, view.stride(), 0)


def run_guarded() -> None:
    """On the least and the most of the CPU's instruction sets."""
    for case, on in ((case, on) for case in CASES for on in {CPU[0], CPU[-1]}):
        if on not in case.backends():
            continue
        for layout in (lambda x: x, *(LAYOUTS[name] for name in GUARDED)):
            print(case.id, on, flush=True)
            base = case.tensors(case.n)
            with running_on(on):
                for at_end in (True, False):
                    tensors = {
                        path: guarded(x if case.arguments[path].written else layout(x), at_end)
                        for path, x in base.items()
                        if case.arguments[path].kind != "bounds"
                    }
                    Run(case, on, case.n, {**case.tensors(case.n), **tensors})
    print("all survived")


GUARDED = ("every second element", "one number", "rows apart")


@pytest.mark.skipif(not CPU, reason="no C++ kernels here")
def test_nothing_outside_is_read():
    """In a process of its own, which a read outside of a tensor would end."""
    done = subprocess.run(
        [sys.executable, "-c", "import test_layouts; test_layouts.run_guarded()"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-200:]}{done.stderr[-2000:]}"
    assert done.stdout.endswith("all survived\n")


# ---- modules, and transforms --------------------------------------------------------------------


def with_strided_vectors(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose biases and norm weights are every second element of poisoned memory."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = LAYOUTS["every second element"](parameter.data)
    return model


MODULES = {
    "Linear": (lambda: torch.nn.Linear(6, 8), ["3,6"]),
    "MultiheadAttention": (lambda: torch.nn.MultiheadAttention(8, 2), ["5,2,8"] * 3),
    "TransformerEncoderLayer": (lambda: torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0), ["5,2,8"]),
    "TransformerDecoderLayer": (
        lambda: torch.nn.TransformerDecoderLayer(8, 2, 16, 0.0),
        ["5,2,8", "4,2,8"],
    ),
    "OutputProjection": (lambda: ft.nn.OutputProjection(6, 8, norm="layer"), ["2,3,6", "2,3,8"]),
    "FeedForward": (lambda: ft.nn.FeedForward(6, 8, "swiglu"), ["2,3,6"]),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_b114_modules_with_strided_vectors(name, training):
    make, shapes = MODULES[name]
    plain = make().train(training)
    odd = with_strided_vectors(plain)
    inputs = [torch.randn([int(n) for n in shape.split(",")]) for shape in shapes]

    def outputs(model):
        ft.swap(model)
        out = model(*inputs)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
        loss = sum(o.square().sum() for o in outs)
        return [*outs, *torch.autograd.grad(loss, list(model.parameters()))]

    assert any(not p.is_contiguous() for p in odd.parameters())
    assert all(torch.equal(a, b) for a, b in zip(outputs(odd), outputs(plain), strict=True))


def test_b114_decoding_with_strided_biases():
    """The step of generation calls its kernels past the public functions."""
    from fasttransformer.models import LanguageModel

    model = LanguageModel(20, 8, 16, 2, 2).eval()
    with torch.no_grad():  # as wide as the rest, so that a wrong bias changes the choice
        for parameter in model.parameters():
            parameter.normal_(0.0, 1.0)
    prompts = [[5, 6, 7], [8, 9]]
    want, got = (
        m.generate(prompts, max_new_tokens=6) for m in (model, with_strided_vectors(model))
    )
    assert want == got


COLUMNS = {
    "linear_add": lambda b: ft.linear_add(torch.ones(2, 3), torch.ones(7, 3), b),
    "gelu": lambda b: ft.linear_add(torch.ones(2, 3), torch.ones(7, 3), b, activation="gelu"),
    "linear_add_layer_norm": lambda b: ft.linear_add_layer_norm(
        torch.ones(2, 3), torch.ones(7, 3), b
    )[0],
    "linear_add_rms_norm": lambda b: ft.linear_add_rms_norm(torch.ones(2, 3), torch.ones(7, 3), b)[
        0
    ],
    "feed_forward": lambda b: ft.feed_forward(
        torch.ones(2, 3), torch.ones(7, 3), b, torch.ones(7, 7), b
    ),
    "linear_softmax": lambda b: ft.linear_softmax(torch.ones(2, 3), torch.ones(7, 3), b),
    "layer_norm": lambda b: ft.layer_norm(torch.arange(14.0).view(2, 7), (7,), b, b),
}


@pytest.mark.parametrize("op", COLUMNS)
def test_b114_vmap_over_columns(op):
    columns = torch.randn(7, 4)
    got = torch.vmap(COLUMNS[op], in_dims=1)(columns)
    want = torch.stack([COLUMNS[op](column.clone()) for column in columns.unbind(1)])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", [on for on in RUNNABLE if on != "triton"])
@pytest.mark.parametrize("head_dim", [1, 2])
def test_b115_gradients_of_heads(backend, head_dim):
    """Every layout of heads; a kernel reads whole rows of them in the backward pass."""
    case = next(c for c in CASES if c.id == "linear_add: heads")
    with running_on(On(backend, case.op)):
        sizes = [(1, 3, 4), (2, 3, 4), (1, 1, 4), (1, 3, 1)]
        for batch, heads, length in sizes[: 2 if backend == "simt" else 4]:
            n = {**case.n, "B": batch, "H": heads, "S": length, "E": head_dim}
            comparison = Comparison(case, backend, n, torch.float32)
            comparison.exact()
            for layout in comparison.layouts["input"]:
                comparison.laid_out(f"input {layout}", {"input": layout})
            assert not comparison.wrong, "\n".join(comparison.wrong)
