"""How much an object looks like another one from the same cameras, by silhouette and color."""

from torch import Tensor


def likeness(pictures: Tensor, silhouettes: Tensor, true_pictures: Tensor, true_silhouettes: Tensor) -> float:
    """Return how alike two objects are, 0 to 1, a mean over views.

    In a view it is the intersection of the silhouettes over their union, times 1 less the distance of the objects' mean
    colors in RGB, each inside its own silhouette. Where no pixel is in both silhouettes it is 0.

    Args:
        pictures: [B, H, W, 3], RGB in [0, 1].
        silhouettes: [B, H, W], True where the object is.
        true_pictures: of the other object, likewise.
        true_silhouettes: likewise.
    """
    common = (silhouettes & true_silhouettes).flatten(1).sum(dim=1)
    union = (silhouettes | true_silhouettes).flatten(1).sum(dim=1).clamp_min(1)
    distance = (mean_colors(pictures, silhouettes) - mean_colors(true_pictures, true_silhouettes)).norm(dim=-1)
    return float((common / union * (1 - distance).clamp_min(0)).mean())


def mean_colors(pictures: Tensor, silhouettes: Tensor) -> Tensor:
    """Return the mean color [B, 3] of pictures [B, H, W, 3] inside silhouettes [B, H, W]; black where one is empty."""
    inside = silhouettes.flatten(1).to(pictures.dtype)
    return (pictures.flatten(1, 2) * inside[..., None]).sum(dim=1) / inside.sum(dim=1, keepdim=True).clamp_min(1)
