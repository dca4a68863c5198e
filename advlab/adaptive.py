"""What an attack needs that adapts to the defence.

Some defences are no stronger than the network behind them, but hide its gradient. They round or
compress the image, so that no gradient comes back; or they draw something at random, so that the
gradient is that of one draw among many (Athalye et al. 2018, 1802.00420; Tramer et al. 2020,
2002.08347). `StraightThrough` gives the first kind a gradient. Against the second kind
`attacks.pgd` averages over draws (its `eot`), and `share_held` measures what is left: an answer
that is drawn counts as often as it is given.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from advlab.data import check_batch, check_images, check_integer
from advlab.forward import Classifier, ask, check_device, gradient_mode, holds, predict


class StraightThrough(nn.Module):
    """A step of preprocessing whose derivative is taken to be that of doing nothing.

    Forward it is ``step(images)``, to the last bit; backward it is the identity. The simplest case
    of BPDA (backward pass differentiable approximation; Athalye et al. 2018, section 4.1.2), right
    where the step leaves an image nearly as it was: rounding, JPEG, a denoiser.

    Args:
        step: Maps images (N, C, H, W) to images of the same shape; it may leave PyTorch.
    """

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step

    def forward(self, images: Tensor) -> Tensor:
        """Return ``step(images)``, through which gradients pass unchanged.

        Raises:
            TypeError: if the step returns no tensor.
            ValueError: if it returns another shape.
        """
        with torch.no_grad():
            made = self.step(images.detach())
        if not isinstance(made, Tensor):
            raise TypeError(f"the step returned a {type(made).__name__}; it must return a tensor")
        if made.shape != images.shape:
            raise ValueError(
                f"the step made {tuple(made.shape)} of {tuple(images.shape)}; a gradient passes "
                "straight through only where the shape stays. Bring it back within the step, or "
                "write a derivative for it (torch.autograd.Function)"
            )
        # Usually written images + (made - images).detach(), which rounds; this adds exactly 0.
        return made.to(images) + (images - images.detach())


def has_gradient(model: Classifier, images: Tensor) -> bool:
    """Tell whether gradients lead from the answers of a model back to the pixels.

    A gradient of zeros leads back, too: this asks for the way, not for what comes along it.

    Args:
        model: Maps images to logits; any callable.
        images: (N, C, H, W) float in [0, 1]; the first is tried.

    Returns:
        False also if the model answers, but fails while a gradient is taken (NumPy in its forward).

    Raises:
        ValueError, TypeError: as `forward.predict`; and what the model itself raises.
    """
    check_images(images)
    check_device(model, images)
    try:
        with gradient_mode(model, images.device):
            x = images[:1].detach().float().clone().requires_grad_()
            logits = ask(model, x)
            if not logits.requires_grad:
                return False
            return torch.autograd.grad(logits.sum(), x, allow_unused=True)[0] is not None
    except RuntimeError:
        predict(model, images[:1])  # raises where the gradient is not to blame
        return False


def share_held(model: Classifier, images: Tensor, labels: Tensor, asks: int = 10) -> Tensor:
    """Return for each image how often a model that answers at random gets it right.

    The mean over images is the accuracy that is to be expected. Asked once, the model would have a
    luckier or unluckier draw; "right at least once" or "always right" would be other measures.

    Args:
        model: Any callable; it draws by itself, so that a second call gives another result.
        images: (N, C, H, W) float in [0, 1].
        labels: (N,) int64.
        asks: How often it is asked about each image.

    Returns:
        (N,) float32, from 0 to 1.

    Raises:
        ValueError, TypeError: as `forward.holds`; if `asks` is below 1.
    """
    check_batch(images, labels)
    check_integer("asks", asks, 1)
    right = torch.zeros(len(images), device=images.device)
    for _ in range(asks):
        right += holds(model, images, labels)
    return right / asks
