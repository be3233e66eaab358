"""LLVM code for what numba cannot express: matrix products in registers, and threads that wait for each other.

Importing this imports numba, so only code that is about to be compiled imports this.

A product of a few rows with a large matrix is limited by reading the matrix from memory. MKL and oneDNN read 9 GB/s on
a machine where two threads that only read reach 24. Here the rows are the lanes of vectors, x `[in, lanes]`. Each
weight is read once, in place, and multiplied with all rows. Where reading takes longer than arithmetic, a tile
prefetches the next tile's weights. Each sum has one accumulator and runs over the inputs in order: a row's bits depend
on nothing else.

Products of two activations, which are both in the processor's cache, have tiles of another kind: one factor is read
entry by entry, in any layout, and the other a vector at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, codegen, config
from numba.extending import intrinsic as _typed_intrinsic

intrinsic: Any = _typed_intrinsic  # its type demands a typing context, which callers do not pass

_settings: Any = config  # numba defines its attributes at run time
_FEATURES = codegen.get_host_cpu_features() if _settings.CPU_FEATURES is None else _settings.CPU_FEATURES
HAS_32_REGISTERS = "+avx512f" in _FEATURES.split(",")
LANES = 16 if HAS_32_REGISTERS else 8  # rows in a vector of floats
ROWS = 12  # outputs that neighbouring tiles compute together
# Tiles as (vectors of rows, outputs): as many accumulators as fit the registers, beside inputs and weights.
WIDE, MIDDLE, NARROW = ((4, 6), (2, 12), (1, 12)) if HAS_32_REGISTERS else ((2, 6), (1, 12), (1, 12))
LONG = 4  # vectors that are computed together for a single output
HIGH = 6  # rows that a product of two activations computes together

_FLOAT, _INT, _INT32 = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_POINTER = ir.PointerType()  # LLVM's pointers are untyped: each load and each offset names the type


def _tile(shape: tuple[int, int], *, unrolled: int, fetches: bool) -> Callable[..., None]:
    """Return tile(x, x_at, num_in, width, apart, address, bias, y, y_at, first, is_residual), for compiled code.

    For outputs n from `first` on and vectors of rows it writes y[n, :] = bias[n] + sum_k w[n, k] x[k, :], plus y's old
    value where `is_residual`. x and y are float32 arrays with `[in, width]` from entry `x_at` on and `[out, width]`
    from `y_at` on. The vectors of x are `apart` entries apart, those of y are adjacent. w is float32 `[out, num_in]` at
    `address`.
    """
    num_vectors, num_outputs = shape

    @intrinsic
    def tile(typing: Any, x, x_at, num_in, width, apart, address, bias, y, y_at, first, is_residual):
        number = types.int64
        signature = types.void(x, *(number,) * 5, bias, y, number, number, types.boolean)

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, x_at, num_in, width, apart, address, bias, y, y_at, first, is_residual = arguments

            def start(place: int, array: Any, entry: Any) -> Any:
                return _entry(builder, _data(context, builder, signature.args[place], array), entry)

            x, bias, y = start(0, x, x_at), start(6, bias, first), start(7, y, y_at)
            weights = builder.inttoptr(address, _POINTER)
            rows = [builder.mul(builder.add(first, _INT(j)), num_in) for j in range(num_outputs)]

            def load(pointer: Any, entry: Any) -> Any:
                return _load(builder, _entry(builder, pointer, entry))

            def place(j: int, v: int) -> Any:
                return builder.add(builder.mul(builder.add(first, _INT(j)), width), _INT(v * LANES))

            add = _declared(builder, f"llvm.fmuladd.v{LANES}f32", _VECTOR, [_VECTOR] * 3)
            sums = []
            for j in range(num_outputs):
                added = _splat(builder, _entry(builder, bias, _INT(j)))
                for v in range(num_vectors):
                    old = builder.select(is_residual, load(y, place(j, v)), ir.Constant(_VECTOR, [0.0] * LANES))
                    sums.append(builder.fadd(added, old))

            def step(k: Any, sums: list[Any], count: int) -> list[Any]:
                sums = list(sums)
                if fetches and count > 1:  # the next tile's weights, which follow this one's
                    for row in rows:
                        ahead = builder.add(builder.add(row, k), builder.mul(num_in, _INT(num_outputs)))
                        _fetch(builder, _entry(builder, weights, ahead))
                for i in range(count):
                    now = builder.add(k, _INT(i))
                    inputs = [
                        load(x, builder.add(builder.mul(now, width), builder.mul(apart, _INT(v))))
                        for v in range(num_vectors)
                    ]
                    for j, row in enumerate(rows):
                        weight = _splat(builder, _entry(builder, weights, builder.add(row, now)))
                        for v, value in enumerate(inputs):
                            at = j * num_vectors + v
                            sums[at] = builder.call(add, [weight, value, sums[at]])
                return sums

            most = builder.sub(num_in, builder.srem(num_in, _INT(unrolled)))
            sums = _loop(builder, _INT(0), most, unrolled, sums, step)
            sums = _loop(builder, most, num_in, 1, sums, step)
            for j in range(num_outputs):
                for v in range(num_vectors):
                    _store(builder, sums[j * num_vectors + v], _entry(builder, y, place(j, v)))
            return context.get_dummy_value()

        return signature, code

    return tile


def _product(num_vectors: int) -> Callable[..., None]:
    """Return product(a, a_row, a_step, b, b_row, num, c, c_row, is_added), for compiled code.

    For `HIGH` rows j it writes `num_vectors` vectors of c[j, :] = sum_k a[j, k] b[k, :], plus c's old value where
    `is_added`. a, b and c are addresses of float32 entries. Those of a are `a_row` entries apart from row to row and
    `a_step` from k to k; those of b and c are adjacent, in rows that are `b_row` and `c_row` entries apart.
    """

    @intrinsic
    def product(typing: Any, a, a_row, a_step, b, b_row, num, c, c_row, is_added):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, a_row, a_step, b, b_row, num, c, c_row, is_added = arguments
            a, b, c = (builder.inttoptr(address, _POINTER) for address in (a, b, c))
            starts = [_entry(builder, a, builder.mul(a_row, _INT(j))) for j in range(HIGH)]
            ends = [
                _entry(builder, c, builder.add(builder.mul(c_row, _INT(j)), _INT(v * LANES)))
                for j in range(HIGH)
                for v in range(num_vectors)
            ]
            nothing = ir.Constant(_VECTOR, [0.0] * LANES)
            sums = [builder.select(is_added, _load(builder, end), nothing) for end in ends]
            add = _declared(builder, f"llvm.fmuladd.v{LANES}f32", _VECTOR, [_VECTOR] * 3)

            def step(k: Any, sums: list[Any], count: int) -> list[Any]:
                row, at = builder.mul(k, b_row), builder.mul(k, a_step)
                inputs = [
                    _load(builder, _entry(builder, b, builder.add(row, _INT(v * LANES)))) for v in range(num_vectors)
                ]
                factors = [_splat(builder, _entry(builder, start, at)) for start in starts]
                pairs = [(factor, value) for factor in factors for value in inputs]
                return [builder.call(add, [*pair, total]) for pair, total in zip(pairs, sums, strict=True)]

            for end, total in zip(ends, _loop(builder, _INT(0), num, 1, sums, step), strict=True):
                _store(builder, total, end)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 8, types.boolean), code

    return product


def _loop(
    builder: Any, start: Any, end: Any, count: int, values: list[Any], step: Callable[..., list[Any]]
) -> list[Any]:
    """Emit `for k in range(start, end, count): values = step(k, values, count)` and return the last values."""
    before = builder.block
    head, body, behind = (builder.append_basic_block(name) for name in ("head", "body", "behind"))
    builder.branch(head)
    builder.position_at_end(head)
    k, carried = builder.phi(_INT), [builder.phi(value.type) for value in values]
    builder.cbranch(builder.icmp_signed("<", k, end), body, behind)
    builder.position_at_end(body)
    new = step(k, carried, count)
    following = builder.add(k, _INT(count))
    for phi, first, then in zip((k, *carried), (start, *values), (following, *new), strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(then, builder.block)
    builder.branch(head)
    builder.position_at_end(behind)
    return carried


def _data(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """Return a pointer to an array's first entry."""
    return builder.inttoptr(_address(context, builder, array_type, array), _POINTER)


def _address(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return builder.ptrtoint(context.make_array(array_type)(context, builder, array).data, _INT)


def _entry(builder: Any, pointer: Any, entry: Any, kind: Any = _FLOAT) -> Any:
    """Return a pointer to one of the entries of this kind that begin at `pointer`."""
    return builder.gep(pointer, [entry], source_etype=kind)


def _load(builder: Any, pointer: Any) -> Any:
    return builder.load(pointer, align=4, typ=_VECTOR)


def _store(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, pointer, align=4)


def _splat(builder: Any, pointer: Any) -> Any:
    """Return a vector whose lanes are all the float at `pointer`."""
    empty = ir.Constant(_VECTOR, ir.Undefined)
    one = builder.insert_element(empty, builder.load(pointer, typ=_FLOAT), _INT32(0))
    return builder.shuffle_vector(one, empty, ir.Constant(ir.VectorType(_INT32, LANES), [0] * LANES))


def _fetch(builder: Any, pointer: Any) -> None:
    fetch = _declared(builder, "llvm.prefetch.p0", ir.VoidType(), [_POINTER, _INT32, _INT32, _INT32])
    builder.call(fetch, [pointer, _INT32(0), _INT32(2), _INT32(1)])  # for reading, into the L2 cache, as data


def _declared(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


wide = _tile(WIDE, unrolled=4, fetches=False)  # with so many rows, arithmetic takes longer than reading
middle = _tile(MIDDLE, unrolled=16, fetches=True)
narrow = _tile(NARROW, unrolled=16, fetches=True)
four = _tile((1, 4), unrolled=4, fetches=False)  # for the last outputs, where they are no multiple of ROWS
long = _tile((LONG, 1), unrolled=4, fetches=False)
single = _tile((1, 1), unrolled=4, fetches=False)

quadruple, double, simple = _product(4), _product(2), _product(1)  # a quadruple one needs 32 registers


@intrinsic
def transpose(typing: Any, x, x_row, y, y_row):
    """Write the transpose of `[LANES, LANES]` float32 entries at x to y; rows are x_row and y_row entries apart."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, x_row, y, y_row = arguments
        x, y = (builder.inttoptr(address, _POINTER) for address in (x, y))
        rows = [_load(builder, _entry(builder, x, builder.mul(x_row, _INT(i)))) for i in range(LANES)]
        bit = 1
        while bit < LANES:  # swap this bit of the row's number with that of the lane's
            lanes = ir.VectorType(_INT32, LANES)
            low = ir.Constant(lanes, [lane + (LANES - bit if lane & bit else 0) for lane in range(LANES)])
            high = ir.Constant(lanes, [lane + (LANES if lane & bit else bit) for lane in range(LANES)])
            for i in range(LANES):
                if not i & bit:
                    pair = rows[i], rows[i + bit]
                    rows[i], rows[i + bit] = builder.shuffle_vector(*pair, low), builder.shuffle_vector(*pair, high)
            bit *= 2
        for i, row in enumerate(rows):
            _store(builder, row, _entry(builder, y, builder.mul(y_row, _INT(i))))
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), code


@intrinsic
def address_of(typing: Any, array):
    """Return the address of an array's first entry."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _address(context, builder, signature.args[0], arguments[0])

    return types.int64(array), code


@intrinsic
def add_atomically(typing: Any, array, entry, value):
    """Add to an int64 entry and return its old value; a thread that reads it atomically sees all earlier writes."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, entry, value = arguments
        place = _entry(builder, _data(context, builder, signature.args[0], array), entry, _INT)
        return builder.atomic_rmw("add", place, value, "seq_cst")

    return types.int64(array, types.int64, types.int64), code


@intrinsic
def read_atomically(typing: Any, array, entry):
    """Return an entry of an int64 array as other threads last wrote it."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, entry = arguments
        place = _entry(builder, _data(context, builder, signature.args[0], array), entry, _INT)
        return builder.load_atomic(place, "acquire", 8, typ=_INT)

    return types.int64(array, types.int64), code


@intrinsic
def let_others_run(typing: Any):
    """Yield the processor to another thread, where the system has a call for that."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if hasattr(os, "sched_yield"):
            builder.call(_declared(builder, "sched_yield", _INT32, []), [])
        return context.get_dummy_value()

    return types.void(), code
