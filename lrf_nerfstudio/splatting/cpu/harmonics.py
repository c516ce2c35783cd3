"""Parts of kernels: real spherical harmonics of 16 Gaussians at once, one in each lane, and the way back."""
# mypy: allow-untyped-defs, allow-untyped-calls

from lrf_nerfstudio.splatting.cpu.simd import (
    LANES,
    broadcast,
    broadcast4,
    fma,
    lane_sum,
    load4,
    load_row,
    load_scalar,
    store,
    store_row,
    store_scalar,
)
from lrf_nerfstudio.splatting.cpu.threads import inline

_SH_0 = 0.2820947917738781
_SH_1 = 0.48860251190292
_SH_2 = (1.092548430592079, 0.5462742152960395, 0.9461746957575601, 0.3153915652525201)
_SH_3 = (
    2.285228997322329,
    0.4570457994644658,
    1.445305721320277,
    0.5900435899266435,
    1.865881662950577,
    1.119528997770346,
)


@inline
def evaluate_harmonics(degree, x, y, z, basis):
    """Evaluate real spherical harmonics of unit directions, the k-th into row k of `basis` (Sloan, JCGT 2013)."""
    store_row(basis, 0, broadcast(_SH_0))
    if degree > 0:
        store_row(basis, 1, -_SH_1 * y)
        store_row(basis, 2, _SH_1 * z)
        store_row(basis, 3, -_SH_1 * x)
    if degree > 1:
        zz = z * z
        c1 = x * x - y * y
        s1 = 2.0 * x * y
        store_row(basis, 4, _SH_2[1] * s1)
        store_row(basis, 5, -_SH_2[0] * z * y)
        store_row(basis, 6, _SH_2[2] * zz - _SH_2[3])
        store_row(basis, 7, -_SH_2[0] * z * x)
        store_row(basis, 8, _SH_2[1] * c1)
        if degree > 2:
            radial = _SH_3[1] - _SH_3[0] * zz
            store_row(basis, 9, -_SH_3[3] * (x * s1 + y * c1))
            store_row(basis, 10, _SH_3[2] * z * s1)
            store_row(basis, 11, radial * y)
            store_row(basis, 12, z * (_SH_3[4] * zz - _SH_3[5]))
            store_row(basis, 13, radial * x)
            store_row(basis, 14, _SH_3[2] * z * c1)
            store_row(basis, 15, -_SH_3[3] * (x * c1 - y * s1))


@inline
def evaluate_harmonics_backward(degree, x, y, z, v):
    """Return the gradient of the unit directions; row k of `v` is that of the k-th harmonic."""
    vx = broadcast(0.0)
    vy = broadcast(0.0)
    vz = broadcast(0.0)
    if degree > 0:
        vx = -_SH_1 * load_row(v, 3)
        vy = -_SH_1 * load_row(v, 1)
        vz = _SH_1 * load_row(v, 2)
    if degree > 1:
        v4 = 2.0 * _SH_2[1] * load_row(v, 4)
        v5 = -_SH_2[0] * load_row(v, 5)
        v7 = -_SH_2[0] * load_row(v, 7)
        v8 = 2.0 * _SH_2[1] * load_row(v, 8)
        vx += fma(y, v4, fma(z, v7, x * v8))
        vy += fma(x, v4, z * v5) - y * v8
        vz += fma(y, v5, fma(x, v7, 2.0 * _SH_2[2] * z * load_row(v, 6)))
        if degree > 2:
            zz = z * z
            c1 = x * x - y * y
            s1 = 2.0 * x * y
            radial = _SH_3[1] - _SH_3[0] * zz
            v9 = -3.0 * _SH_3[3] * load_row(v, 9)
            v10 = _SH_3[2] * load_row(v, 10)
            v11 = load_row(v, 11)
            v13 = load_row(v, 13)
            v14 = _SH_3[2] * load_row(v, 14)
            v15 = -3.0 * _SH_3[3] * load_row(v, 15)
            turn = 2.0 * z
            vx += fma(s1, v9, c1 * v15) + fma(radial, v13, turn * fma(y, v10, x * v14))
            vy += (c1 * v9 - s1 * v15) + fma(radial, v11, turn * (x * v10 - y * v14))
            vz += fma(s1, v10, c1 * v14) - 2.0 * _SH_3[0] * z * fma(y, v11, x * v13)
            vz += (3.0 * _SH_3[4] * zz - _SH_3[5]) * load_row(v, 12)
    return vx, vy, vz


@inline
def weigh_harmonics(basis, lane, n_bases, constant, rest, first, channels, out, target):
    """Weigh one Gaussian's harmonics by their coefficients; return 0 times the sum over the channels.

    With b_k = basis[k, lane]: out[target + c] = b_0 constant[target + c] + sum_k b_k rest[first + (k - 1) channels + c]
    """
    doubt = 0.0
    whole = channels // 4 * 4
    for c in range(0, whole, 4):
        total = load_scalar(basis, lane) * load4(constant, target + c)
        other = broadcast4(0.0)
        for k in range(1, n_bases - 1, 2):  # two sums, so that one need not wait for the other
            at = first + (k - 1) * channels + c
            total = fma(load_scalar(basis, k * LANES + lane), load4(rest, at), total)
            other = fma(load_scalar(basis, (k + 1) * LANES + lane), load4(rest, at + channels), other)
        if n_bases % 2 == 0:
            k = n_bases - 1
            total = fma(load_scalar(basis, k * LANES + lane), load4(rest, first + (k - 1) * channels + c), total)
        store(out, target + c, total + other)
    for c in range(whole, channels):
        value = basis[0, lane] * constant[target + c]
        for k in range(1, n_bases):
            value += basis[k, lane] * rest[first + (k - 1) * channels + c]
        out[target + c] = value
    for c in range(channels):
        doubt += 0.0 * out[target + c]
    return doubt


@inline
def weigh_harmonics_backward(
    basis, v_basis, k, lane, coefficients, v_coefficients, at, channels, v_colors, source, add
):
    """Adjoint of weighing the k-th harmonic: write (or add to) v_coefficients[at + c], write v_basis[k, lane]."""
    whole = channels // 4 * 4
    total = broadcast4(0.0)
    for c in range(0, whole, 4):
        v = load4(v_colors, source + c)
        total = fma(v, load4(coefficients, at + c), total)
        v_coefficient = load_scalar(basis, k * LANES + lane) * v
        if add:
            v_coefficient += load4(v_coefficients, at + c)
        store(v_coefficients, at + c, v_coefficient)
    value = lane_sum(total)
    for c in range(whole, channels):
        value += v_colors[source + c] * coefficients[at + c]
        v_coefficient = basis[k, lane] * v_colors[source + c]
        v_coefficients[at + c] = v_coefficients[at + c] + v_coefficient if add else v_coefficient
    store_scalar(v_basis, k * LANES + lane, value)
