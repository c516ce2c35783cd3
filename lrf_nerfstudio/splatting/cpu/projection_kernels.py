"""Kernels that project Gaussians into one camera (EWA splatting) and evaluate their harmonics, and the way back.

Notation, for one Gaussian: R_q and S are rotation and scales, (R, t) is the camera, U = R R_q S, J the (clamped)
Jacobian of the projection at the centre and P = J U, so that the projected covariance is P P^T + eps I. Working with
the factors keeps the determinant a sum of squares, |P_0 x P_1|^2, which cannot come out negative. 16 Gaussians are
worked on at once, one in each lane.
"""
# mypy: allow-untyped-defs, allow-untyped-calls

import numpy as np

from lrf_nerfstudio.splatting.cpu.simd import (
    LANES,
    absolute,
    any_lane,
    broadcast,
    broadcast4,
    ceil,
    fma,
    lane_sum,
    load,
    load4,
    load_scalar,
    maximum,
    minimum,
    select,
    sqrt,
    store,
    store_scalar,
)
from lrf_nerfstudio.splatting.cpu.threads import inline, kernel

CAMERA_SIZE = 19
"""A camera is a float32 array: rotation (9, row-major), translation (3), fx, fy, cx, cy, position in the world (3)."""

CHUNK = 2048
"""Gaussians per range handed to a thread; also the unit in which the camera's gradient is summed (a fixed order)."""

_MAX_RADIUS = 2.0**30

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
def _gather(source, stride, first, count, scratch, row):
    """Transposes `count` rows of `stride` numbers into lanes: scratch[row + k] holds number k of 16 rows."""
    for lane in range(count):
        for k in range(stride):
            store_scalar(scratch, (row + k) * LANES + lane, load_scalar(source, (first + lane) * stride + k))


@inline
def _row(scratch, row):
    return load(scratch, row * LANES)


@inline
def _put(scratch, row, vector):
    store(scratch, row * LANES, vector)


@inline
def _dot(a, b):
    return fma(a[0], b[0], fma(a[1], b[1], a[2] * b[2]))


@inline
def _combine(a, u, b, v):
    """A * u + b * v for scalars (per lane) a, b and 3-vectors u, v."""
    return (fma(a, u[0], b * v[0]), fma(a, u[1], b * v[1]), fma(a, u[2], b * v[2]))


@inline
def _scaled(a, u):
    return (a * u[0], a * u[1], a * u[2])


@inline
def _normalised_quat(w, x, y, z):
    """Unit quaternion and the inverse norm."""
    inverse = 1.0 / sqrt(fma(w, w, fma(x, x, fma(y, y, z * z))))
    return w * inverse, x * inverse, y * inverse, z * inverse, inverse


@inline
def _rotation_rows(w, x, y, z):
    """Rows of the rotation matrix of a unit quaternion."""
    return (
        (1.0 - 2.0 * fma(y, y, z * z), 2.0 * (x * y - w * z), 2.0 * fma(x, z, w * y)),
        (2.0 * fma(x, y, w * z), 1.0 - 2.0 * fma(x, x, z * z), 2.0 * (y * z - w * x)),
        (2.0 * (x * z - w * y), 2.0 * fma(y, z, w * x), 1.0 - 2.0 * fma(x, x, y * y)),
    )


@inline
def _camera_row(camera, i, rows):
    """Row i of (camera rotation) @ (matrix given by rows)."""
    first = _scaled(broadcast(camera[3 * i]), rows[0])
    second = _combine(broadcast(camera[3 * i + 1]), rows[1], broadcast(camera[3 * i + 2]), rows[2])
    return (first[0] + second[0], first[1] + second[1], first[2] + second[2])


@inline
def _camera_coordinate(camera, i, mean):
    return fma(camera[3 * i], mean[0], fma(camera[3 * i + 1], mean[1], fma(camera[3 * i + 2], mean[2], camera[9 + i])))


@inline
def _clamped_slopes(camera, width, height, slope_x, slope_y):
    """x/z and y/z, kept within 1.3 times the field of view, where the linearised projection is still sensible."""
    fx, fy, cx, cy = camera[12], camera[13], camera[14], camera[15]
    margin_x = 0.15 * width / fx
    margin_y = 0.15 * height / fy
    clamped_x = maximum(minimum(slope_x, (width - cx) / fx + margin_x), -(cx / fx + margin_x))
    clamped_y = maximum(minimum(slope_y, (height - cy) / fy + margin_y), -(cy / fy + margin_y))
    return clamped_x, clamped_y


@inline
def _factors(camera, width, height, scratch):
    """What forward and backward have in common; scratch rows: means 0-2, quats 3-6, scales 7-9."""
    mean = (_row(scratch, 0), _row(scratch, 1), _row(scratch, 2))
    scale = (_row(scratch, 7), _row(scratch, 8), _row(scratch, 9))
    w, x, y, z, inverse_norm = _normalised_quat(_row(scratch, 3), _row(scratch, 4), _row(scratch, 5), _row(scratch, 6))
    rows = _rotation_rows(w, x, y, z)
    scaled = (
        (rows[0][0] * scale[0], rows[0][1] * scale[1], rows[0][2] * scale[2]),
        (rows[1][0] * scale[0], rows[1][1] * scale[1], rows[1][2] * scale[2]),
        (rows[2][0] * scale[0], rows[2][1] * scale[1], rows[2][2] * scale[2]),
    )
    factor = (_camera_row(camera, 0, scaled), _camera_row(camera, 1, scaled), _camera_row(camera, 2, scaled))
    centre = (
        _camera_coordinate(camera, 0, mean),
        _camera_coordinate(camera, 1, mean),
        _camera_coordinate(camera, 2, mean),
    )
    inverse_z = 1.0 / centre[2]
    slope_x = centre[0] * inverse_z
    slope_y = centre[1] * inverse_z
    clamped_x, clamped_y = _clamped_slopes(camera, width, height, slope_x, slope_y)
    jacobian = (
        camera[12] * inverse_z,
        -camera[12] * clamped_x * inverse_z,
        camera[13] * inverse_z,
        -camera[13] * clamped_y * inverse_z,
    )
    p0 = _combine(jacobian[0], factor[0], jacobian[1], factor[2])
    p1 = _combine(jacobian[2], factor[1], jacobian[3], factor[2])
    slopes = (slope_x, slope_y, clamped_x, clamped_y)
    return mean, scale, (w, x, y, z), inverse_norm, rows, scaled, factor, centre, inverse_z, slopes, jacobian, p0, p1


@inline
def _covariance(p0, p1, eps2d):
    """Covariance without eps (xx, xy, yy), its determinant, and the determinant with eps."""
    xx = _dot(p0, p0)
    xy = _dot(p0, p1)
    yy = _dot(p1, p1)
    cross = (
        p0[1] * p1[2] - p0[2] * p1[1],
        p0[2] * p1[0] - p0[0] * p1[2],
        p0[0] * p1[1] - p0[1] * p1[0],
    )
    sharp = _dot(cross, cross)
    return xx, xy, yy, sharp, fma(eps2d, xx + yy + eps2d, sharp)


@inline
def _direction(camera, scratch):
    """Unit vector from the camera to the mean, and the inverse distance."""
    x = _row(scratch, 0) - camera[16]
    y = _row(scratch, 1) - camera[17]
    z = _row(scratch, 2) - camera[18]
    inverse = 1.0 / sqrt(fma(x, x, fma(y, y, z * z)))
    return x * inverse, y * inverse, z * inverse, inverse


@inline
def _harmonics(degree, x, y, z, basis):
    """Real spherical harmonics of a unit direction; row k of `basis` receives the k-th (Sloan, JCGT 2013)."""
    _put(basis, 0, broadcast(_SH_0))
    if degree > 0:
        _put(basis, 1, -_SH_1 * y)
        _put(basis, 2, _SH_1 * z)
        _put(basis, 3, -_SH_1 * x)
    if degree > 1:
        zz = z * z
        c1 = x * x - y * y
        s1 = 2.0 * x * y
        _put(basis, 4, _SH_2[1] * s1)
        _put(basis, 5, -_SH_2[0] * z * y)
        _put(basis, 6, _SH_2[2] * zz - _SH_2[3])
        _put(basis, 7, -_SH_2[0] * z * x)
        _put(basis, 8, _SH_2[1] * c1)
        if degree > 2:
            radial = _SH_3[1] - _SH_3[0] * zz
            _put(basis, 9, -_SH_3[3] * (x * s1 + y * c1))
            _put(basis, 10, _SH_3[2] * z * s1)
            _put(basis, 11, radial * y)
            _put(basis, 12, z * (_SH_3[4] * zz - _SH_3[5]))
            _put(basis, 13, radial * x)
            _put(basis, 14, _SH_3[2] * z * c1)
            _put(basis, 15, -_SH_3[3] * (x * c1 - y * s1))


@inline
def _harmonics_backward(degree, x, y, z, v):
    """Gradient with respect to the unit direction; row k of `v` is that of the k-th harmonic."""
    vx = broadcast(0.0)
    vy = broadcast(0.0)
    vz = broadcast(0.0)
    if degree > 0:
        vx = -_SH_1 * _row(v, 3)
        vy = -_SH_1 * _row(v, 1)
        vz = _SH_1 * _row(v, 2)
    if degree > 1:
        v4 = 2.0 * _SH_2[1] * _row(v, 4)
        v5 = -_SH_2[0] * _row(v, 5)
        v7 = -_SH_2[0] * _row(v, 7)
        v8 = 2.0 * _SH_2[1] * _row(v, 8)
        vx += fma(y, v4, fma(z, v7, x * v8))
        vy += fma(x, v4, z * v5) - y * v8
        vz += fma(y, v5, fma(x, v7, 2.0 * _SH_2[2] * z * _row(v, 6)))
        if degree > 2:
            zz = z * z
            c1 = x * x - y * y
            s1 = 2.0 * x * y
            radial = _SH_3[1] - _SH_3[0] * zz
            v9 = -3.0 * _SH_3[3] * _row(v, 9)
            v10 = _SH_3[2] * _row(v, 10)
            v11 = _row(v, 11)
            v13 = _row(v, 13)
            v14 = _SH_3[2] * _row(v, 14)
            v15 = -3.0 * _SH_3[3] * _row(v, 15)
            turn = 2.0 * z
            vx += fma(s1, v9, c1 * v15) + fma(radial, v13, turn * fma(y, v10, x * v14))
            vy += (c1 * v9 - s1 * v15) + fma(radial, v11, turn * (x * v10 - y * v14))
            vz += fma(s1, v10, c1 * v14) - 2.0 * _SH_3[0] * z * fma(y, v11, x * v13)
            vz += (3.0 * _SH_3[4] * zz - _SH_3[5]) * _row(v, 12)
    return vx, vy, vz


@inline
def _weigh_coefficients(basis, lane, n_bases, constant, rest, first, channels, out, target):
    """One Gaussian's harmonics weighed by their coefficients; returns 0 * the sum over the channels.

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


@kernel
def project(begin, end, gaussians, camera, view, harmonics, projected):
    """Project Gaussians begin..end into a camera.

    Arrays are flat; the last ones of `gaussians` and of `projected` are not touched where features are plain.

    Args:
        begin: First Gaussian.
        end: One after the last.
        gaussians: means [N * 3], quats [N * 4], scales [N * 3], opacities [N], features [N * C] (plain or the
            coefficients of degree 0) and features_rest [N * (K - 1) * C] (those of the other harmonics).
        camera: [CAMERA_SIZE].
        view: width, height, near_plane, far_plane and eps2d.
        harmonics: Their degree (-1: features are plain), K - 1, and C.
        projected: Written: radii [N] (0: not visible, and all that follows is 0), means2d [N * 2], depths [N],
            conics [N * 3], compensations [N] and colors [N * C].
    """
    means, quats, scales, opacities, features, features_rest = gaussians
    width, height, near_plane, far_plane, eps2d = view
    degree, n_rest, channels = harmonics
    radii, means2d, depths, conics, compensations, colors = projected
    scratch = np.zeros((18, LANES), np.float32)
    basis = np.empty((16, LANES), np.float32)
    for first in range(begin, end, LANES):
        count = min(LANES, end - first)
        _gather(means, 3, first, count, scratch, 0)
        _gather(quats, 4, first, count, scratch, 3)
        _gather(scales, 3, first, count, scratch, 7)
        _gather(opacities, 1, first, count, scratch, 10)
        _, _, _, _, _, _, _, centre, _, slopes, _, p0, p1 = _factors(camera, width, height, scratch)
        xx, xy, yy, sharp, det = _covariance(p0, p1, eps2d)
        inverse_det = 1.0 / det
        half_trace = 0.5 * (xx + yy) + eps2d
        radius = ceil(3.0 * sqrt(half_trace + sqrt(maximum(half_trace * half_trace - det, 0.01))))
        u = fma(camera[12], slopes[0], camera[14])
        v = fma(camera[13], slopes[1], camera[15])
        depth = centre[2]
        conic_a = (yy + eps2d) * inverse_det
        conic_b = -xy * inverse_det
        conic_c = (xx + eps2d) * inverse_det
        doubt = 0.0 * (u + v + conic_a + conic_b + conic_c + depth + _row(scratch, 10))  # not 0: NaN or inf
        visible = (det > 0.0) & (depth > near_plane) & (depth < far_plane) & (radius > 0.0)
        visible = visible & (u + radius > 0.0) & (u - radius < width)
        visible = visible & (v + radius > 0.0) & (v - radius < height)
        visible = visible & (absolute(doubt) <= 0.0)
        _put(scratch, 11, select(visible, minimum(radius, _MAX_RADIUS), 0.0))
        _put(scratch, 12, u)
        _put(scratch, 13, v)
        _put(scratch, 14, depth)
        _put(scratch, 15, conic_a)
        _put(scratch, 16, conic_b)
        _put(scratch, 17, conic_c)
        _put(scratch, 10, sqrt(maximum(sharp * inverse_det, 0.0)))
        if degree >= 0 and any_lane(visible):
            x, y, z, _ = _direction(camera, scratch)
            _harmonics(degree, x, y, z, basis)
        for lane in range(count):
            i = first + lane
            radius_px = np.int32(scratch[11, lane])
            if radius_px > 0:
                if degree >= 0:
                    start = i * n_rest * channels
                    n_bases = (degree + 1) * (degree + 1)
                    doubtful = _weigh_coefficients(
                        basis, lane, n_bases, features, features_rest, start, channels, colors, i * channels
                    )
                else:
                    doubtful = 0.0
                    for c in range(channels):
                        doubtful += 0.0 * features[i * channels + c]
                if doubtful != 0.0:  # NaN too
                    radius_px = np.int32(0)
            radii[i] = radius_px
            if radius_px == 0:
                scratch[10:, lane] = 0.0
                if degree >= 0:
                    for c in range(channels):
                        store_scalar(colors, i * channels + c, 0.0)
            store_scalar(compensations, i, load_scalar(scratch, 10 * LANES + lane))
            store_scalar(means2d, 2 * i, load_scalar(scratch, 12 * LANES + lane))
            store_scalar(means2d, 2 * i + 1, load_scalar(scratch, 13 * LANES + lane))
            store_scalar(depths, i, load_scalar(scratch, 14 * LANES + lane))
            store_scalar(conics, 3 * i, load_scalar(scratch, 15 * LANES + lane))
            store_scalar(conics, 3 * i + 1, load_scalar(scratch, 16 * LANES + lane))
            store_scalar(conics, 3 * i + 2, load_scalar(scratch, 17 * LANES + lane))


@inline
def _spread(basis, v_basis, k, lane, coefficients, v_coefficients, at, channels, v_colors, source, add):
    """Adjoint of weighing the k-th harmonic: writes (or adds to) v_coefficients[at + c], writes v_basis[k, lane]."""
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


@inline
def _gather_ids(source, stride, ids, first, count, scratch, row):
    """`_gather` for the Gaussians ids[first], ids[first + 1], ..."""
    for lane in range(count):
        for k in range(stride):
            value = load_scalar(source, load_scalar(ids, first + lane) * stride + k)
            store_scalar(scratch, (row + k) * LANES + lane, value)


@inline
def _scatter_ids(target, stride, ids, first, count, scratch, row, add):
    """The reverse of `_gather_ids`; adds to what is there, or replaces it."""
    for lane in range(count):
        for k in range(stride):
            spot = load_scalar(ids, first + lane) * stride + k
            value = load_scalar(scratch, (row + k) * LANES + lane)
            store_scalar(target, spot, load_scalar(target, spot) + value if add else value)


@inline
def _column(rows, j):
    return (rows[0][j], rows[1][j], rows[2][j])


@inline
def _camera_column(camera, j, rows):
    """Row j of (camera rotation)^T @ (matrix given by rows)."""
    first = _scaled(broadcast(camera[j]), rows[0])
    others = _combine(broadcast(camera[3 + j]), rows[1], broadcast(camera[6 + j]), rows[2])
    return (first[0] + others[0], first[1] + others[1], first[2] + others[2])


@inline
def _camera_column_dot(camera, j, v):
    return fma(camera[j], v[0], fma(camera[3 + j], v[1], camera[6 + j] * v[2]))


@inline
def _add_camera_row(v_camera, i, v_centre, mean, v_factor, scaled):
    """Gradient of row i of the camera's rotation and translation: of R (R_q S) and of R mean + t."""
    _put(v_camera, 3 * i, _row(v_camera, 3 * i) + fma(v_centre, mean[0], _dot(v_factor, scaled[0])))
    _put(v_camera, 3 * i + 1, _row(v_camera, 3 * i + 1) + fma(v_centre, mean[1], _dot(v_factor, scaled[1])))
    _put(v_camera, 3 * i + 2, _row(v_camera, 3 * i + 2) + fma(v_centre, mean[2], _dot(v_factor, scaled[2])))
    _put(v_camera, 9 + i, _row(v_camera, 9 + i) + v_centre)


@inline
def _covariance_backward(p0, p1, eps2d, v_conic_a, v_conic_b, v_conic_c, v_compensation):
    """Gradient with respect to the factor P, from those of the conic and of the compensation."""
    xx, xy, yy, sharp, det = _covariance(p0, p1, eps2d)
    inverse_det = 1.0 / det

    # Conic Y = X^-1 of the covariance X: v_X = -Y v_Y Y.
    a = (yy + eps2d) * inverse_det
    b = -xy * inverse_det
    c = (xx + eps2d) * inverse_det
    v_conic_b = 0.5 * v_conic_b  # stands twice in the matrix
    aa = fma(a, v_conic_a, b * v_conic_b)
    ab = fma(a, v_conic_b, b * v_conic_c)
    ba = fma(b, v_conic_a, c * v_conic_b)
    bb = fma(b, v_conic_b, c * v_conic_c)
    v_xx = -fma(aa, a, ab * b)
    v_xy = -fma(aa, b, ab * c)
    v_yy = -fma(ba, b, bb * c)

    # Compensation sqrt(sharp / det); the derivative of a determinant is the adjugate matrix.
    compensation = sqrt(maximum(sharp * inverse_det, 0.0))
    v_sharp = 0.5 * v_compensation * inverse_det / (compensation + 1e-6)
    v_det = -v_sharp * compensation * compensation
    v_both = v_sharp + v_det
    v_xx += fma(v_both, yy, v_det * eps2d)
    v_yy += fma(v_both, xx, v_det * eps2d)
    v_xy += -v_both * xy

    v_p0 = _combine(2.0 * v_xx, p0, 2.0 * v_xy, p1)
    v_p1 = _combine(2.0 * v_xy, p0, 2.0 * v_yy, p1)
    return v_p0, v_p1


@inline
def _direction_backward(degree, camera, scratch, v_basis):
    """Gradient with respect to (mean - camera position), through its normalisation."""
    x, y, z, inverse = _direction(camera, scratch)
    v_x, v_y, v_z = _harmonics_backward(degree, x, y, z, v_basis)
    along = fma(x, v_x, fma(y, v_y, z * v_z))
    return inverse * (v_x - along * x), inverse * (v_y - along * y), inverse * (v_z - along * z)


@inline
def _quat_backward(quat, inverse_norm, v_scaled, scale):
    """Gradient with respect to the unnormalised quaternion, from that of (R_q S)."""
    w, x, y, z = quat
    r00, r01, r02 = v_scaled[0][0] * scale[0], v_scaled[0][1] * scale[1], v_scaled[0][2] * scale[2]
    r10, r11, r12 = v_scaled[1][0] * scale[0], v_scaled[1][1] * scale[1], v_scaled[1][2] * scale[2]
    r20, r21, r22 = v_scaled[2][0] * scale[0], v_scaled[2][1] * scale[1], v_scaled[2][2] * scale[2]
    v_w = 2.0 * fma(x, r21 - r12, fma(y, r02 - r20, z * (r10 - r01)))
    v_x = 2.0 * fma(y, r10 + r01, fma(z, r20 + r02, w * (r21 - r12)) - 2.0 * x * (r11 + r22))
    v_y = 2.0 * fma(x, r10 + r01, fma(z, r21 + r12, w * (r02 - r20)) - 2.0 * y * (r00 + r22))
    v_z = 2.0 * fma(x, r20 + r02, fma(y, r21 + r12, w * (r10 - r01)) - 2.0 * z * (r00 + r11))
    along = fma(w, v_w, fma(x, v_x, fma(y, v_y, z * v_z)))
    return (
        inverse_norm * (v_w - along * w),
        inverse_norm * (v_x - along * x),
        inverse_norm * (v_y - along * y),
        inverse_norm * (v_z - along * z),
    )


@kernel
def project_backward(begin, end, gaussians, camera, view, harmonics, radii, v_projected, add, v_gaussians, v_cameras):
    """Adjoint of `project`.

    Args:
        begin: First Gaussian, a multiple of `CHUNK`.
        end: One after the last.
        gaussians: As given to `project`.
        camera: Likewise.
        view: Likewise.
        harmonics: Likewise.
        radii: What `project` wrote [N].
        v_projected: Gradients of means2d, depths, conics, compensations and colors (read only with harmonics).
        add: Whether the gradients of the Gaussians are added to those of other cameras, or written.
        v_gaussians: Written: gradients of means, quats, scales and, with harmonics, of features and features_rest.
        v_cameras: Written, [chunks, 15]: gradients of rotation (9), translation (3) and position (3), from each chunk.
    """
    means, quats, scales, _, features, features_rest = gaussians
    width, height, _, _, eps2d = view
    degree, n_rest, channels = harmonics
    v_means2d, v_depths, v_conics, v_compensations, v_colors = v_projected
    v_means, v_quats, v_scales, v_features, v_features_rest = v_gaussians
    scratch = np.zeros((18, LANES), np.float32)
    basis = np.empty((16, LANES), np.float32)
    v_basis = np.zeros((16, LANES), np.float32)
    v_camera = np.zeros((15, LANES), np.float32)
    n_bases = (degree + 1) * (degree + 1)
    ids = np.empty(end - begin + LANES, np.int64)
    n_visible = 0
    for i in range(begin, end):
        if radii[i] > 0:
            ids[n_visible] = i
            n_visible += 1
        elif not add:
            v_means[3 * i : 3 * i + 3] = 0.0
            v_quats[4 * i : 4 * i + 4] = 0.0
            v_scales[3 * i : 3 * i + 3] = 0.0
        if degree >= 0 and not add:
            written = 0 if radii[i] <= 0 else n_bases - 1
            if radii[i] <= 0:
                v_features[i * channels : (i + 1) * channels] = 0.0
            v_features_rest[(i * n_rest + written) * channels : (i + 1) * n_rest * channels] = 0.0
    for lane in range(LANES):  # lanes without a Gaussian compute on the last one, with gradients of zero
        ids[n_visible + lane] = ids[max(n_visible - 1, 0)]
    for first in range(0, n_visible, LANES):
        count = min(LANES, n_visible - first)
        _gather_ids(means, 3, ids, first, LANES, scratch, 0)
        _gather_ids(quats, 4, ids, first, LANES, scratch, 3)
        _gather_ids(scales, 3, ids, first, LANES, scratch, 7)
        scratch[10:17] = 0.0
        _gather_ids(v_means2d, 2, ids, first, count, scratch, 10)
        _gather_ids(v_depths, 1, ids, first, count, scratch, 12)
        _gather_ids(v_conics, 3, ids, first, count, scratch, 13)
        _gather_ids(v_compensations, 1, ids, first, count, scratch, 16)
        if degree >= 0:
            x, y, z, _ = _direction(camera, scratch)
            _harmonics(degree, x, y, z, basis)
            for lane in range(count):
                at = ids[first + lane]
                own = at * channels
                _spread(basis, v_basis, 0, lane, features, v_features, own, channels, v_colors, own, add)
                for k in range(1, n_bases):
                    start = (at * n_rest + k - 1) * channels
                    _spread(
                        basis, v_basis, k, lane, features_rest, v_features_rest, start, channels, v_colors, own, add
                    )
            v_basis[:, count:] = 0.0
        mean, scale, quat, inverse_norm, rows, scaled, factor, _, inverse_z, slopes, jacobian, p0, p1 = _factors(
            camera, width, height, scratch
        )
        v_p0, v_p1 = _covariance_backward(
            p0, p1, eps2d, _row(scratch, 13), _row(scratch, 14), _row(scratch, 15), _row(scratch, 16)
        )

        # P = J U. Jacobian entries are f / z and -f s / z, where s = x / z follows the centre unless it is clamped.
        v_scale_x = _dot(v_p0, factor[0])
        v_shear_x = _dot(v_p0, factor[2])
        v_scale_y = _dot(v_p1, factor[1])
        v_shear_y = _dot(v_p1, factor[2])
        free_x = absolute(slopes[0] - slopes[2]) <= 0.0
        free_y = absolute(slopes[1] - slopes[3]) <= 0.0
        v_x = inverse_z * fma(camera[12], _row(scratch, 10), select(free_x, -jacobian[0] * v_shear_x, 0.0))
        v_y = inverse_z * fma(camera[13], _row(scratch, 11), select(free_y, -jacobian[2] * v_shear_y, 0.0))
        v_jacobian = fma(v_scale_x, jacobian[0], v_shear_x * jacobian[1])
        v_jacobian += fma(v_scale_y, jacobian[2], v_shear_y * jacobian[3])
        v_z = _row(scratch, 12) - fma(inverse_z, v_jacobian, fma(v_x, slopes[0], v_y * slopes[1]))
        v_centre = (v_x, v_y, v_z)
        v_factor = (
            _scaled(jacobian[0], v_p0),
            _scaled(jacobian[2], v_p1),
            _combine(jacobian[1], v_p0, jacobian[3], v_p1),
        )

        # U = R (R_q S) and centre = R mean + t.
        _add_camera_row(v_camera, 0, v_centre[0], mean, v_factor[0], scaled)
        _add_camera_row(v_camera, 1, v_centre[1], mean, v_factor[1], scaled)
        _add_camera_row(v_camera, 2, v_centre[2], mean, v_factor[2], scaled)
        v_scaled = (
            _camera_column(camera, 0, v_factor),
            _camera_column(camera, 1, v_factor),
            _camera_column(camera, 2, v_factor),
        )
        v_mean_x = _camera_column_dot(camera, 0, v_centre)
        v_mean_y = _camera_column_dot(camera, 1, v_centre)
        v_mean_z = _camera_column_dot(camera, 2, v_centre)
        if degree > 0:
            v_x, v_y, v_z = _direction_backward(degree, camera, scratch, v_basis)
            v_mean_x += v_x
            v_mean_y += v_y
            v_mean_z += v_z
            _put(v_camera, 12, _row(v_camera, 12) - v_x)
            _put(v_camera, 13, _row(v_camera, 13) - v_y)
            _put(v_camera, 14, _row(v_camera, 14) - v_z)
        v_w, v_qx, v_qy, v_qz = _quat_backward(quat, inverse_norm, v_scaled, scale)
        _put(scratch, 0, v_mean_x)
        _put(scratch, 1, v_mean_y)
        _put(scratch, 2, v_mean_z)
        _put(scratch, 3, v_w)
        _put(scratch, 4, v_qx)
        _put(scratch, 5, v_qy)
        _put(scratch, 6, v_qz)
        _put(scratch, 7, _dot(_column(v_scaled, 0), _column(rows, 0)))
        _put(scratch, 8, _dot(_column(v_scaled, 1), _column(rows, 1)))
        _put(scratch, 9, _dot(_column(v_scaled, 2), _column(rows, 2)))
        _scatter_ids(v_means, 3, ids, first, count, scratch, 0, add)
        _scatter_ids(v_quats, 4, ids, first, count, scratch, 3, add)
        _scatter_ids(v_scales, 3, ids, first, count, scratch, 7, add)
    for k in range(15):
        total = 0.0
        for lane in range(LANES):
            total += v_camera[k, lane]
        v_cameras[begin // CHUNK, k] = total
