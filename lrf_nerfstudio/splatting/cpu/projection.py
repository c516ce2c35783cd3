"""Kernels that project Gaussians into one camera (EWA splatting) and evaluate their harmonics, and the way back.

Notation, for one Gaussian: R_q and S are rotation and scales, (R, t) is the camera, U = R R_q S, J the (clamped)
Jacobian of the projection at the center and P = J U, so that the projected covariance is P P^T + eps I. Working with
the factors keeps the determinant a sum of squares, |P_0 x P_1|^2, which cannot come out negative. 16 Gaussians are
worked on at once, one in each lane.
"""
# mypy: allow-untyped-defs, allow-untyped-calls

from typing import NamedTuple

import numpy as np

from lrf_nerfstudio.splatting.cpu.harmonics import (
    evaluate_harmonics,
    evaluate_harmonics_backward,
    weigh_harmonics,
    weigh_harmonics_backward,
)
from lrf_nerfstudio.splatting.cpu.simd import (
    LANES,
    absolute,
    any_lane,
    broadcast,
    ceil,
    fma,
    load_row,
    load_scalar,
    maximum,
    minimum,
    select,
    sqrt,
    store_row,
    store_scalar,
)
from lrf_nerfstudio.splatting.cpu.threads import inline, kernel

CAMERA_SIZE = 19
"""A camera is a float32 array: rotation (9, row-major), translation (3), fx, fy, cx, cy, position in the world (3)."""

CHUNK = 2048
"""Gaussians in a range that is handed to a thread, and those over which a camera's gradient is summed first."""

_MAX_RADIUS = 2.0**30


@inline
def _gather(source, stride, first, count, scratch, row):
    """Transpose `count` rows of `stride` numbers into lanes: scratch[row + k] receives number k of 16 rows."""
    for lane in range(count):
        for k in range(stride):
            store_scalar(scratch, (row + k) * LANES + lane, load_scalar(source, (first + lane) * stride + k))


@inline
def _dot(a, b):
    return fma(a[0], b[0], fma(a[1], b[1], a[2] * b[2]))


@inline
def _combine(a, u, b, v):
    """Return a u + b v for scalars (one per lane) a, b and 3-vectors u, v."""
    return (fma(a, u[0], b * v[0]), fma(a, u[1], b * v[1]), fma(a, u[2], b * v[2]))


@inline
def _scaled(a, u):
    return (a * u[0], a * u[1], a * u[2])


@inline
def _normalized_quat(quat):
    """Return the unit quaternion w, x, y, z and the inverse norm."""
    w, x, y, z = quat
    inverse = 1.0 / sqrt(fma(w, w, fma(x, x, fma(y, y, z * z))))
    return w * inverse, x * inverse, y * inverse, z * inverse, inverse


@inline
def _rotation_rows(w, x, y, z):
    """Return the rows of the rotation matrix of a unit quaternion."""
    return (
        (1.0 - 2.0 * fma(y, y, z * z), 2.0 * (x * y - w * z), 2.0 * fma(x, z, w * y)),
        (2.0 * fma(x, y, w * z), 1.0 - 2.0 * fma(x, x, z * z), 2.0 * (y * z - w * x)),
        (2.0 * (x * z - w * y), 2.0 * fma(y, z, w * x), 1.0 - 2.0 * fma(x, x, y * y)),
    )


@inline
def _camera_row(camera, i, rows):
    """Return row i of (camera rotation) @ (matrix given by rows)."""
    first = _scaled(broadcast(camera[3 * i]), rows[0])
    second = _combine(broadcast(camera[3 * i + 1]), rows[1], broadcast(camera[3 * i + 2]), rows[2])
    return (first[0] + second[0], first[1] + second[1], first[2] + second[2])


@inline
def _camera_coordinate(camera, i, mean):
    return fma(camera[3 * i], mean[0], fma(camera[3 * i + 1], mean[1], fma(camera[3 * i + 2], mean[2], camera[9 + i])))


@inline
def _clamped_slopes(camera, width, height, slope_x, slope_y):
    """Clamp x/z and y/z to 1.3 times the field of view, where the linearized projection is still sensible."""
    fx, fy, cx, cy = camera[12], camera[13], camera[14], camera[15]
    margin_x = 0.15 * width / fx
    margin_y = 0.15 * height / fy
    clamped_x = maximum(minimum(slope_x, (width - cx) / fx + margin_x), -(cx / fx + margin_x))
    clamped_y = maximum(minimum(slope_y, (height - cy) / fy + margin_y), -(cy / fy + margin_y))
    return clamped_x, clamped_y


class _Factors(NamedTuple):
    """What projection and its adjoint have in common; vectors and matrices (by rows) are tuples, in the lanes."""

    mean: tuple
    scale: tuple
    quat: tuple
    """Normalized."""
    inverse_norm: object
    """Of the quaternion."""
    rotation: tuple
    """R_q."""
    scaled: tuple
    """R_q S."""
    factor: tuple
    """U = R R_q S."""
    center: tuple
    """In the camera's coordinates."""
    inverse_z: object
    slopes: tuple
    """x / z, y / z, and both clamped."""
    jacobian: tuple
    """The entries of J that are not 0: fx / z, -fx x / z^2, fy / z, -fy y / z^2, with clamped slopes."""
    p0: tuple
    """Rows of P = J U."""
    p1: tuple


@inline
def _factors(camera, width, height, scratch):
    """Compute the factors of 16 Gaussians; rows of `scratch`: means 0-2, quats 3-6, scales 7-9."""
    mean = (load_row(scratch, 0), load_row(scratch, 1), load_row(scratch, 2))
    scale = (load_row(scratch, 7), load_row(scratch, 8), load_row(scratch, 9))
    quat = load_row(scratch, 3), load_row(scratch, 4), load_row(scratch, 5), load_row(scratch, 6)
    w, x, y, z, inverse_norm = _normalized_quat(quat)
    rows = _rotation_rows(w, x, y, z)
    scaled = (
        (rows[0][0] * scale[0], rows[0][1] * scale[1], rows[0][2] * scale[2]),
        (rows[1][0] * scale[0], rows[1][1] * scale[1], rows[1][2] * scale[2]),
        (rows[2][0] * scale[0], rows[2][1] * scale[1], rows[2][2] * scale[2]),
    )
    factor = (_camera_row(camera, 0, scaled), _camera_row(camera, 1, scaled), _camera_row(camera, 2, scaled))
    center = (
        _camera_coordinate(camera, 0, mean),
        _camera_coordinate(camera, 1, mean),
        _camera_coordinate(camera, 2, mean),
    )
    inverse_z = 1.0 / center[2]
    slope_x = center[0] * inverse_z
    slope_y = center[1] * inverse_z
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
    return _Factors(
        mean, scale, (w, x, y, z), inverse_norm, rows, scaled, factor, center, inverse_z, slopes, jacobian, p0, p1
    )


@inline
def _covariance(p0, p1, eps2d):
    """Return the covariance without eps (xx, xy, yy), its determinant, and the determinant with eps."""
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
    """Return the unit vector from the camera to the mean, and the inverse distance."""
    x = load_row(scratch, 0) - camera[16]
    y = load_row(scratch, 1) - camera[17]
    z = load_row(scratch, 2) - camera[18]
    inverse = 1.0 / sqrt(fma(x, x, fma(y, y, z * z)))
    return x * inverse, y * inverse, z * inverse, inverse


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
        factors = _factors(camera, width, height, scratch)
        xx, xy, yy, sharp, det = _covariance(factors.p0, factors.p1, eps2d)
        inverse_det = 1.0 / det
        half_trace = 0.5 * (xx + yy) + eps2d
        radius = ceil(3.0 * sqrt(half_trace + sqrt(maximum(half_trace * half_trace - det, 0.01))))
        u = fma(camera[12], factors.slopes[0], camera[14])
        v = fma(camera[13], factors.slopes[1], camera[15])
        depth = factors.center[2]
        conic_a = (yy + eps2d) * inverse_det
        conic_b = -xy * inverse_det
        conic_c = (xx + eps2d) * inverse_det
        doubt = 0.0 * (u + v + conic_a + conic_b + conic_c + depth + load_row(scratch, 10))  # not 0: NaN or inf
        visible = (det > 0.0) & (depth > near_plane) & (depth < far_plane) & (radius > 0.0)
        visible = visible & (u + radius > 0.0) & (u - radius < width)
        visible = visible & (v + radius > 0.0) & (v - radius < height)
        visible = visible & (absolute(doubt) <= 0.0)
        store_row(scratch, 11, select(visible, minimum(radius, _MAX_RADIUS), 0.0))
        store_row(scratch, 12, u)
        store_row(scratch, 13, v)
        store_row(scratch, 14, depth)
        store_row(scratch, 15, conic_a)
        store_row(scratch, 16, conic_b)
        store_row(scratch, 17, conic_c)
        store_row(scratch, 10, sqrt(maximum(sharp * inverse_det, 0.0)))
        if degree >= 0 and any_lane(visible):
            x, y, z, _ = _direction(camera, scratch)
            evaluate_harmonics(degree, x, y, z, basis)
        for lane in range(count):
            i = first + lane
            radius_px = np.int32(scratch[11, lane])
            if radius_px > 0:
                if degree >= 0:
                    start = i * n_rest * channels
                    n_bases = (degree + 1) * (degree + 1)
                    doubtful = weigh_harmonics(
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
def _gather_ids(source, stride, ids, first, count, scratch, row):
    """Do as `_gather` for the Gaussians ids[first], ids[first + 1], ..."""
    for lane in range(count):
        for k in range(stride):
            value = load_scalar(source, load_scalar(ids, first + lane) * stride + k)
            store_scalar(scratch, (row + k) * LANES + lane, value)


@inline
def _scatter_ids(target, stride, ids, first, count, scratch, row, add):
    """Write lanes back to the Gaussians ids[first], ids[first + 1], ..., or add them to what is there."""
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
    """Return row j of (camera rotation)^T @ (matrix given by rows)."""
    first = _scaled(broadcast(camera[j]), rows[0])
    others = _combine(broadcast(camera[3 + j]), rows[1], broadcast(camera[6 + j]), rows[2])
    return (first[0] + others[0], first[1] + others[1], first[2] + others[2])


@inline
def _camera_column_dot(camera, j, v):
    return fma(camera[j], v[0], fma(camera[3 + j], v[1], camera[6 + j] * v[2]))


@inline
def _add_camera_row(v_camera, i, v_center, mean, v_factor, scaled):
    """Add the gradients of row i of the camera's rotation and translation, through R (R_q S) and R mean + t."""
    store_row(v_camera, 3 * i, load_row(v_camera, 3 * i) + fma(v_center, mean[0], _dot(v_factor, scaled[0])))
    store_row(v_camera, 3 * i + 1, load_row(v_camera, 3 * i + 1) + fma(v_center, mean[1], _dot(v_factor, scaled[1])))
    store_row(v_camera, 3 * i + 2, load_row(v_camera, 3 * i + 2) + fma(v_center, mean[2], _dot(v_factor, scaled[2])))
    store_row(v_camera, 9 + i, load_row(v_camera, 9 + i) + v_center)


@inline
def _covariance_backward(p0, p1, eps2d, v_conic, v_compensation):
    """Return the gradient of the factor P from those of the conic and of the compensation."""
    xx, xy, yy, sharp, det = _covariance(p0, p1, eps2d)
    inverse_det = 1.0 / det

    # Conic Y = X^-1 of the covariance X: v_X = -Y v_Y Y.
    a = (yy + eps2d) * inverse_det
    b = -xy * inverse_det
    c = (xx + eps2d) * inverse_det
    v_conic_a, v_conic_b, v_conic_c = v_conic
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
    """Return the gradient of (mean - camera position), through its normalization."""
    x, y, z, inverse = _direction(camera, scratch)
    v_x, v_y, v_z = evaluate_harmonics_backward(degree, x, y, z, v_basis)
    along = fma(x, v_x, fma(y, v_y, z * v_z))
    return inverse * (v_x - along * x), inverse * (v_y - along * y), inverse * (v_z - along * z)


@inline
def _quat_backward(factors, v_scaled):
    """Return the gradient of the quaternion before its normalization from that of R_q S."""
    w, x, y, z = factors.quat
    inverse_norm, scale = factors.inverse_norm, factors.scale
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
            evaluate_harmonics(degree, x, y, z, basis)
            for lane in range(count):
                at = ids[first + lane]
                own = at * channels
                weigh_harmonics_backward(
                    basis, v_basis, 0, lane, features, v_features, own, channels, v_colors, own, add
                )
                for k in range(1, n_bases):
                    start = (at * n_rest + k - 1) * channels
                    weigh_harmonics_backward(
                        basis, v_basis, k, lane, features_rest, v_features_rest, start, channels, v_colors, own, add
                    )
            v_basis[:, count:] = 0.0
        factors = _factors(camera, width, height, scratch)
        factor, inverse_z, slopes, jacobian = factors.factor, factors.inverse_z, factors.slopes, factors.jacobian
        v_conic = load_row(scratch, 13), load_row(scratch, 14), load_row(scratch, 15)
        v_p0, v_p1 = _covariance_backward(factors.p0, factors.p1, eps2d, v_conic, load_row(scratch, 16))

        # P = J U. Jacobian entries are f / z and -f s / z, where s = x / z follows the center unless it is clamped.
        v_scale_x = _dot(v_p0, factor[0])
        v_shear_x = _dot(v_p0, factor[2])
        v_scale_y = _dot(v_p1, factor[1])
        v_shear_y = _dot(v_p1, factor[2])
        free_x = absolute(slopes[0] - slopes[2]) <= 0.0
        free_y = absolute(slopes[1] - slopes[3]) <= 0.0
        v_x = inverse_z * fma(camera[12], load_row(scratch, 10), select(free_x, -jacobian[0] * v_shear_x, 0.0))
        v_y = inverse_z * fma(camera[13], load_row(scratch, 11), select(free_y, -jacobian[2] * v_shear_y, 0.0))
        v_jacobian = fma(v_scale_x, jacobian[0], v_shear_x * jacobian[1])
        v_jacobian += fma(v_scale_y, jacobian[2], v_shear_y * jacobian[3])
        v_z = load_row(scratch, 12) - fma(inverse_z, v_jacobian, fma(v_x, slopes[0], v_y * slopes[1]))
        v_center = (v_x, v_y, v_z)
        v_factor = (
            _scaled(jacobian[0], v_p0),
            _scaled(jacobian[2], v_p1),
            _combine(jacobian[1], v_p0, jacobian[3], v_p1),
        )

        # U = R (R_q S) and center = R mean + t.
        _add_camera_row(v_camera, 0, v_center[0], factors.mean, v_factor[0], factors.scaled)
        _add_camera_row(v_camera, 1, v_center[1], factors.mean, v_factor[1], factors.scaled)
        _add_camera_row(v_camera, 2, v_center[2], factors.mean, v_factor[2], factors.scaled)
        v_scaled = (
            _camera_column(camera, 0, v_factor),
            _camera_column(camera, 1, v_factor),
            _camera_column(camera, 2, v_factor),
        )
        v_mean_x = _camera_column_dot(camera, 0, v_center)
        v_mean_y = _camera_column_dot(camera, 1, v_center)
        v_mean_z = _camera_column_dot(camera, 2, v_center)
        if degree > 0:
            v_x, v_y, v_z = _direction_backward(degree, camera, scratch, v_basis)
            v_mean_x += v_x
            v_mean_y += v_y
            v_mean_z += v_z
            store_row(v_camera, 12, load_row(v_camera, 12) - v_x)
            store_row(v_camera, 13, load_row(v_camera, 13) - v_y)
            store_row(v_camera, 14, load_row(v_camera, 14) - v_z)
        v_w, v_qx, v_qy, v_qz = _quat_backward(factors, v_scaled)
        store_row(scratch, 0, v_mean_x)
        store_row(scratch, 1, v_mean_y)
        store_row(scratch, 2, v_mean_z)
        store_row(scratch, 3, v_w)
        store_row(scratch, 4, v_qx)
        store_row(scratch, 5, v_qy)
        store_row(scratch, 6, v_qz)
        store_row(scratch, 7, _dot(_column(v_scaled, 0), _column(factors.rotation, 0)))
        store_row(scratch, 8, _dot(_column(v_scaled, 1), _column(factors.rotation, 1)))
        store_row(scratch, 9, _dot(_column(v_scaled, 2), _column(factors.rotation, 2)))
        _scatter_ids(v_means, 3, ids, first, count, scratch, 0, add)
        _scatter_ids(v_quats, 4, ids, first, count, scratch, 3, add)
        _scatter_ids(v_scales, 3, ids, first, count, scratch, 7, add)
    for k in range(15):
        total = 0.0
        for lane in range(LANES):
            total += v_camera[k, lane]
        v_cameras[begin // CHUNK, k] = total
