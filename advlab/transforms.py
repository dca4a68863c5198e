"""FGSM as a torchvision transform, for a chain of data augmentations (paper, section 6.1).

`Pictures` is a data set for such a chain to work on.
"""

from numbers import Real

import torch
from PIL.Image import Image
from torch import Tensor

from advlab._torchvision import tv_tensors, v2
from advlab.attacks import check_eps, fgsm
from advlab.data import Split, check_batch
from advlab.forward import Classifier


class Pictures(torch.utils.data.Dataset[tuple[Image, int]]):
    """A split as torchvision's data sets give theirs: at an index, a PIL picture and its label.

    Args:
        split: On any device.
    """

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        picture = v2.functional.to_pil_image(self.split.images[index].cpu())
        return picture, int(self.split.labels[index])


class FGSMTransform(v2.Transform):
    """FGSM as a torchvision transform of image and label together (paper, section 6.1).

    The paper has two, `FGSMTransform` and `FGSMTransformCNNLSTM` (its section 2), one for each of
    its networks; this one is for any model that maps images to logits.

    Works in `v2.Compose` on one sample (image (C, H, W), label an int) or on a batch (images
    (N, C, H, W), labels (N,)). torchvision's classification sets give their `transform` the image
    alone; `data.WithTransforms` gives both. Images must be float in [0, 1], so put
    ``v2.ToImage()`` and ``v2.ToDtype(torch.float32, scale=True)`` before it, and every flip or crop
    too: the direction belongs to the pixels it was made from.

    Args:
        model: The model whose gradient is used.
        eps: Size of the step, from 0 to 1.
        p: Probability with which an image is attacked; each image of a batch has its own draw.
        per_image_statistics: As in `fgsm`; the paper's transform is ``True``.

    Raises:
        ValueError: if `eps` or `p` is not between 0 and 1.
    """

    def __init__(
        self, model: Classifier, eps: float, p: float = 1.0, per_image_statistics: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(p, Real) or isinstance(p, bool) or not 0 <= p <= 1:
            raise ValueError(f"p is {p!r}; it is a probability, from 0 to 1")
        self.eps: float = check_eps(eps)
        self.p: float = p
        self.per_image_statistics: bool = per_image_statistics
        # In a list, so that the attacked model is not registered as a part of this module: moving
        # or switching the transform must not move or switch the model.
        self._source: list[Classifier] = [model]

    def forward(self, *inputs: object) -> tuple[Tensor, object]:
        """Return (attacked image, label) for ``transform(image, label)`` or one pair of them."""
        pair = inputs[0] if len(inputs) == 1 else inputs
        if isinstance(pair, Tensor) or not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                "FGSMTransform needs the label too: call it with (image, label). The `transform` "
                "of a torchvision data set gets the image alone; wrap the data set instead: "
                "advlab.data.WithTransforms(dataset, v2.Compose([..., FGSMTransform(...)]))"
            )
        image, label = pair
        if not isinstance(image, Tensor):
            raise TypeError(
                f"FGSMTransform got {type(image).__name__}; put v2.ToImage() and "
                "v2.ToDtype(torch.float32, scale=True) before it"
            )
        single = image.ndim == 3
        images = image.as_subclass(Tensor).unsqueeze(0) if single else image.as_subclass(Tensor)
        labels = torch.as_tensor(label, device=images.device)
        labels = labels[None] if single else labels
        check_batch(images, labels)
        chosen = (torch.rand(len(images)) < self.p).to(images.device)
        attacked = images.clone()
        if chosen.any():
            attacked[chosen] = fgsm(
                self._source[0],
                images[chosen],
                labels[chosen],
                self.eps,
                per_image_statistics=self.per_image_statistics,
            )
        result = attacked[0] if single else attacked
        return (
            tv_tensors.wrap(result, like=image) if isinstance(image, tv_tensors.Image) else result,
            label,
        )

    def extra_repr(self) -> str:
        """Show the settings when the transform is printed."""
        return f"eps={self.eps}, p={self.p}, per_image_statistics={self.per_image_statistics}"
