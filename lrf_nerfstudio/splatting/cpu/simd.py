"""Explicit SIMD for numba: vectors of float32 and int32 as values inside kernels.

LLVM vectorizes a loop over pixels only when it can prove a great deal; here the vectors are spelled out instead, so
that the kernels are vector code on every machine (one AVX-512 register, two AVX ones or four NEON ones hold the 16
lanes). No fast-math flag is used: multiply-adds are fused where the source says `fma`, NaN and inf behave as in
IEEE 754, and two kernels that evaluate the same expression get the same bits.

Inside a kernel, `+ - * /`, unary minus, comparisons and `&` work on vectors, mixed with scalars too; the functions
below do the rest. Indices are offsets into flattened C-contiguous arrays and are not checked.
"""
# mypy: allow-untyped-defs, allow-untyped-calls

import math
import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, lower_cast, models, register_model

from lrf_nerfstudio.splatting.cpu.threads import inline

LANES = 16
"""Lanes of the wide vectors: one 4 x 4 block of pixels, or 16 Gaussians."""

_F32 = ir.FloatType()
_I32 = ir.IntType(32)


class VectorType(types.Type):
    """Numba type of a fixed-length vector; `element` is "f32", "i32" or "mask" (what a comparison gives)."""

    def __init__(self, element: str, lanes: int):
        self.element = element
        self.lanes = lanes
        super().__init__(name=f"simd.{element}x{lanes}")


class FloatVector(VectorType):
    """float32 lanes."""

    def __init__(self, lanes: int):
        super().__init__("f32", lanes)


class IntVector(VectorType):
    """int32 lanes."""

    def __init__(self, lanes: int):
        super().__init__("i32", lanes)


class MaskVector(VectorType):
    """One bit per lane."""

    def __init__(self, lanes: int):
        super().__init__("mask", lanes)


_ELEMENTS = {"f32": _F32, "i32": _I32, "mask": ir.IntType(1)}


def _llvm_type(vector: VectorType) -> ir.VectorType:
    return ir.VectorType(_ELEMENTS[vector.element], vector.lanes)


class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _llvm_type(fe_type))


for _kind in (FloatVector, IntVector, MaskVector):
    register_model(_kind)(_VectorModel)


def _splat(builder, value, lanes: int):
    """Return a vector with `value` in every lane."""
    vector = ir.VectorType(value.type, lanes)
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), _indices([0] * lanes))


def _indices(lanes: list[int]):
    return ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)


def _constant(value: float, lanes: int):
    return ir.Constant(ir.VectorType(_F32, lanes), [value] * lanes)


@lower_cast(types.Float, FloatVector)
@lower_cast(types.Integer, FloatVector)
def _scalar_to_vector(context, builder, fromty, toty, value):
    return _splat(builder, context.cast(builder, value, fromty, types.float32), toty.lanes)


def _register(function, emit, result=None) -> None:
    """Type and lower a binary operator on float vectors and scalars, which are broadcast."""

    @infer_global(function)
    class _Binary(AbstractTemplate):
        def generic(self, args, kws):
            vectors = [arg for arg in args if isinstance(arg, FloatVector)]
            numbers = [arg for arg in args if isinstance(arg, types.Number)]
            if len(args) != 2 or not vectors or len(vectors) + len(numbers) != 2:
                return None
            return signature((result or FloatVector)(vectors[0].lanes), vectors[0], vectors[0])

    @lower_builtin(function, FloatVector, FloatVector)
    def _lower(context, builder, sig, args):
        return emit(builder, *args)


_register(operator.add, lambda builder, a, b: builder.fadd(a, b))
_register(operator.iadd, lambda builder, a, b: builder.fadd(a, b))
_register(operator.sub, lambda builder, a, b: builder.fsub(a, b))
_register(operator.mul, lambda builder, a, b: builder.fmul(a, b))
_register(operator.truediv, lambda builder, a, b: builder.fdiv(a, b))
_register(operator.lt, lambda builder, a, b: builder.fcmp_ordered("<", a, b), MaskVector)
_register(operator.le, lambda builder, a, b: builder.fcmp_ordered("<=", a, b), MaskVector)
_register(operator.gt, lambda builder, a, b: builder.fcmp_ordered(">", a, b), MaskVector)
_register(operator.ge, lambda builder, a, b: builder.fcmp_ordered(">=", a, b), MaskVector)


@infer_global(operator.neg)
class _Negate(AbstractTemplate):
    def generic(self, args, kws):
        if len(args) == 1 and isinstance(args[0], FloatVector):
            return signature(args[0], args[0])
        return None


@lower_builtin(operator.neg, FloatVector)
def _lower_negate(context, builder, sig, args):
    return builder.fneg(args[0])


@infer_global(operator.and_)
class _And(AbstractTemplate):
    def generic(self, args, kws):
        if len(args) == 2 and isinstance(args[0], MaskVector) and args[0] == args[1]:
            return signature(args[0], *args)
        return None


@lower_builtin(operator.and_, MaskVector, MaskVector)
def _lower_and(context, builder, sig, args):
    return builder.and_(*args)


def _intrinsic_call(builder, name: str, args):
    """Call the LLVM intrinsic `name`, whose result and arguments all have the type of the first argument."""
    kind = args[0].type
    element = {_F32: "f32", _I32: "i32"}[kind.element]
    function_type = ir.FunctionType(kind, [arg.type for arg in args])
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}.v{kind.count}{element}")
    return builder.call(function, args)


@intrinsic
def fma(typingctx, a, b, c):
    """Return `a * b + c`, rounded once where the machine has the instruction. Scalars are broadcast."""
    vector = next((arg for arg in (a, b, c) if isinstance(arg, FloatVector)), None)
    if vector is None:
        return None

    def codegen(context, builder, sig, args):
        values = [context.cast(builder, v, kind, vector) for v, kind in zip(args, sig.args, strict=True)]
        return _intrinsic_call(builder, "fmuladd", values)

    return signature(vector, a, b, c), codegen


def _elementwise(name: str, doc: str):
    """Make an intrinsic of one float vector that LLVM offers as `llvm.<name>`."""

    @intrinsic
    def function(typingctx, a):
        if not isinstance(a, FloatVector):
            return None
        return signature(a, a), lambda context, builder, sig, args: _intrinsic_call(builder, name, args)

    function.__doc__ = doc
    return function


sqrt = _elementwise("sqrt", "Square root of every lane.")
absolute = _elementwise("fabs", "Absolute value of every lane.")
ceil = _elementwise("ceil", "Every lane rounded up.")
floor = _elementwise("floor", "Every lane rounded down.")


@intrinsic
def select(typingctx, mask, a, b):
    """Take lanes of `a` where `mask` is set, of `b` elsewhere. A scalar is broadcast to the type of the other one."""
    vector = a if isinstance(a, VectorType) else b
    if not (isinstance(mask, MaskVector) and isinstance(vector, VectorType)):
        return None

    def codegen(context, builder, sig, args):
        values = [context.cast(builder, v, kind, vector) for v, kind in zip(args[1:], sig.args[1:], strict=True)]
        return builder.select(args[0], *values)

    return signature(vector, mask, a, b), codegen


def _extremum(name: str, comparison: str):
    @intrinsic
    def function(typingctx, a, b):
        if not isinstance(a, FloatVector):
            return None

        def codegen(context, builder, sig, args):
            other = context.cast(builder, args[1], sig.args[1], a)
            return builder.select(builder.fcmp_ordered(comparison, args[0], other), args[0], other)

        return signature(a, a, b), codegen

    function.__doc__ = f"The {name} of each lane of `a` and `b`; `b` where `a` is NaN."
    return function


minimum = _extremum("smaller", "<")
maximum = _extremum("larger", ">")


@intrinsic
def any_lane(typingctx, mask):
    """Tell whether any lane of a mask is set."""
    if not isinstance(mask, MaskVector):
        return None

    def codegen(context, builder, sig, args):
        bits = ir.IntType(mask.lanes)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], bits), ir.Constant(bits, 0))

    return signature(types.boolean, mask), codegen


@intrinsic
def broadcast(typingctx, value):
    """Return a float32 vector of LANES lanes with `value` in each."""
    if not isinstance(value, types.Number):
        return None
    vector = FloatVector(LANES)
    return signature(vector, value), lambda context, builder, sig, args: context.cast(
        builder, args[0], sig.args[0], vector
    )


@intrinsic
def broadcast_int(typingctx, value):
    """Return an int32 vector of LANES lanes with `value` in each."""
    if not isinstance(value, types.Integer):
        return None

    def codegen(context, builder, sig, args):
        return _splat(builder, context.cast(builder, args[0], sig.args[0], types.int32), LANES)

    return signature(IntVector(LANES), value), codegen


@intrinsic
def not_above(typingctx, a, b):
    """Return the mask `a <= b` of two int32 vectors."""
    if not (isinstance(a, IntVector) and a == b):
        return None
    return signature(MaskVector(a.lanes), a, b), lambda context, builder, sig, args: builder.icmp_signed("<=", *args)


@intrinsic
def lane_numbers(typingctx, divisor, modulus):
    """Return `(lane // divisor) % modulus` for every lane, as floats; both are literal integers."""
    if not (isinstance(divisor, types.IntegerLiteral) and isinstance(modulus, types.IntegerLiteral)):
        return None
    values = [float(lane // divisor.literal_value % modulus.literal_value) for lane in range(LANES)]

    def codegen(context, builder, sig, args):
        return ir.Constant(ir.VectorType(_F32, LANES), values)

    return signature(FloatVector(LANES), divisor, modulus), codegen


def _element_pointer(context, builder, array_type, array, index_type, index):
    data = context.make_array(array_type)(context, builder, array).data
    offset = context.cast(builder, index, index_type, types.intp)
    return builder.gep(data, [offset])


def _is_array(array, dtype) -> bool:
    return isinstance(array, types.Array) and array.dtype == dtype and array.layout == "C"


def _loader(lanes: int):
    @intrinsic
    def function(typingctx, array, index):
        element = {types.float32: FloatVector, types.int32: IntVector}.get(getattr(array, "dtype", None))
        if element is None or not _is_array(array, array.dtype):
            return None
        vector = element(lanes)

        def codegen(context, builder, sig, args):
            pointer = _element_pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
            pointer = builder.bitcast(pointer, _llvm_type(vector).as_pointer())
            return builder.load(pointer, align=4)

        return signature(vector, array, index), codegen

    function.__doc__ = f"The {lanes} elements of `array` from flat `index` on."
    return function


load = _loader(LANES)
load4 = _loader(4)


@intrinsic
def load_scalar(typingctx, array, index):
    """Return `array.ravel()[index]` without checks."""
    if not isinstance(array, types.Array) or array.layout != "C":
        return None

    def codegen(context, builder, sig, args):
        return builder.load(_element_pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1]))

    return signature(array.dtype, array, index), codegen


@intrinsic
def store_scalar(typingctx, array, index, value):
    """Do `array.ravel()[index] = value` without checks."""
    if not isinstance(array, types.Array) or array.layout != "C":
        return None

    def codegen(context, builder, sig, args):
        pointer = _element_pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        builder.store(context.cast(builder, args[2], sig.args[2], sig.args[0].dtype), pointer)
        return context.get_dummy_value()

    return signature(types.none, array, index, value), codegen


@intrinsic
def prefetch(typingctx, array, index):
    """Ask for the cache line of `array.ravel()[index]`, which may lie anywhere."""
    if not isinstance(array, types.Array) or array.layout != "C":
        return None

    def codegen(context, builder, sig, args):
        pointer = _element_pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, *(ir.Constant(_I32, value) for value in (0, 3, 1))])  # read, keep, data
        return context.get_dummy_value()

    return signature(types.none, array, index), codegen


@intrinsic
def load_broadcast(typingctx, array, index):
    """Return one float32 element of `array` in all LANES lanes."""
    if not _is_array(array, types.float32):
        return None

    def codegen(context, builder, sig, args):
        pointer = _element_pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        return _splat(builder, builder.load(pointer), LANES)

    return signature(FloatVector(LANES), array, index), codegen


@intrinsic
def store(typingctx, array, index, vector):
    """Write a vector into `array` from flat `index` on."""
    if not (isinstance(vector, (FloatVector, IntVector)) and isinstance(array, types.Array) and array.layout == "C"):
        return None

    def codegen(context, builder, sig, args):
        pointer = _element_pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        builder.store(args[2], builder.bitcast(pointer, args[2].type.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature(types.none, array, index, vector), codegen


@inline
def load_row(matrix, row):
    """Return row `row` of a float32 array [..., LANES]."""
    return load(matrix, row * LANES)


@inline
def store_row(matrix, row, vector):
    """Write row `row` of an array [..., LANES]."""
    store(matrix, row * LANES, vector)


@intrinsic
def broadcast4(typingctx, value):
    """Return a float32 vector of 4 lanes with `value` in each."""
    vector = FloatVector(4)
    return signature(vector, value), lambda context, builder, sig, args: context.cast(
        builder, args[0], sig.args[0], vector
    )


@intrinsic
def lane_sums(typingctx, vectors):
    """Sum over the lanes of each of 4 vectors (a tuple), into one vector of 4 lanes.

    The vectors are folded pairwise into each other, which takes three operations a sum instead of eight. The order of
    additions is fixed.
    """
    if not (isinstance(vectors, types.UniTuple) and vectors.count == 4 and isinstance(vectors.dtype, FloatVector)):
        return None
    lanes = vectors.dtype.lanes

    def fold(builder, a, b, group: int):
        """Halve the groups of `group` lanes of a and b; the result holds a's groups, then b's."""
        half = group // 2
        starts = [*range(0, lanes, group), *range(lanes, 2 * lanes, group)]
        left = _indices([start + k for start in starts for k in range(half)])
        right = _indices([start + half + k for start in starts for k in range(half)])
        return builder.fadd(builder.shuffle_vector(a, b, left), builder.shuffle_vector(a, b, right))

    def codegen(context, builder, sig, args):
        a, b, c, d = (builder.extract_value(args[0], k) for k in range(4))
        total = fold(builder, fold(builder, a, b, lanes), fold(builder, c, d, lanes), lanes // 2)
        group = lanes // 4
        while group > 1:
            half = group // 2
            left = _indices([start + k for start in range(0, 4 * group, group) for k in range(half)])
            right = _indices([start + half + k for start in range(0, 4 * group, group) for k in range(half)])
            total = builder.fadd(
                builder.shuffle_vector(total, total, left), builder.shuffle_vector(total, total, right)
            )
            group = half
        return total

    return signature(FloatVector(4), vectors), codegen


@intrinsic
def lane_sum(typingctx, a):
    """Return the sum of the lanes of a vector as float32; pairs first, then pairs of pairs."""
    if not isinstance(a, FloatVector):
        return None

    def codegen(context, builder, sig, args):
        value, lanes = args[0], a.lanes
        while lanes > 1:
            lanes //= 2
            halves = (_indices(list(range(start, start + lanes))) for start in (0, lanes))
            value = builder.fadd(*(builder.shuffle_vector(value, value, half) for half in halves))
        return builder.extract_element(value, ir.Constant(_I32, 0))

    return signature(types.float32, a), codegen


_EXP2_POLYNOMIAL = (1.32764725e-3, 9.67554189e-3, 5.55071309e-2, 2.40221202e-1, 6.93146944e-1, 1.00000012)
"""Minimax polynomial (relative error) of 2^f on [-1/2, 1/2], highest power first; error below 8e-8 before rounding."""


@intrinsic
def exp2(typingctx, a):
    """Raise 2 to the power of every lane, for lanes in [-100, 100]; relative error below 3e-7."""
    if not isinstance(a, FloatVector):
        return None
    lanes = a.lanes

    def codegen(context, builder, sig, args):
        whole = _intrinsic_call(builder, "rint", args)
        fraction = builder.fsub(args[0], whole)
        value = _constant(_EXP2_POLYNOMIAL[0], lanes)
        for coefficient in _EXP2_POLYNOMIAL[1:]:
            value = _intrinsic_call(builder, "fmuladd", [value, fraction, _constant(coefficient, lanes)])
        integers = ir.VectorType(_I32, lanes)
        exponent = builder.shl(builder.fptosi(whole, integers), ir.Constant(integers, [23] * lanes))
        return builder.bitcast(builder.add(builder.bitcast(value, integers), exponent), value.type)

    return signature(a, a), codegen


_SQRT_HALF_BITS = 0x3F3504F3
_LOG2_SERIES = tuple(2.0 / (k * math.log(2.0)) for k in (9, 7, 5, 3, 1))
"""log2(m) = sum over odd k of 2 / (k ln 2) ((m - 1) / (m + 1))^k, highest power first."""


@intrinsic
def log2(typingctx, a):
    """Take the logarithm to base 2 of every lane, for normal positive numbers; absolute error below 5e-7."""
    if not isinstance(a, FloatVector):
        return None
    lanes = a.lanes

    def codegen(context, builder, sig, args):
        integers = ir.VectorType(_I32, lanes)
        bits = builder.bitcast(args[0], integers)
        # a = 2^exponent * mantissa, with the mantissa between sqrt(1/2) and sqrt(2)
        offset = builder.sub(bits, ir.Constant(integers, [_SQRT_HALF_BITS] * lanes))
        exponent = builder.ashr(offset, ir.Constant(integers, [23] * lanes))
        scale = builder.shl(exponent, ir.Constant(integers, [23] * lanes))
        mantissa = builder.bitcast(builder.sub(bits, scale), args[0].type)
        one = _constant(1.0, lanes)
        ratio = builder.fdiv(builder.fsub(mantissa, one), builder.fadd(mantissa, one))
        square = builder.fmul(ratio, ratio)
        value = _constant(_LOG2_SERIES[0], lanes)
        for coefficient in _LOG2_SERIES[1:]:
            value = _intrinsic_call(builder, "fmuladd", [value, square, _constant(coefficient, lanes)])
        return _intrinsic_call(builder, "fmuladd", [value, ratio, builder.sitofp(exponent, args[0].type)])

    return signature(a, a), codegen
