"""Faster ways to learn, for the best models of each kind: optimizer, layer, loss, batches, views.

All stand beside `utils.train`, which takes them as it takes any optimizer and any batches. The
ideas are others', named where they are used; most are gathered in Jordan, 94% on CIFAR-10 in 3.29
Seconds, 2024 (arXiv:2404.00498), whose airbench94 is the benchmark; Muon and that script are from
github.com/KellerJordan/cifar10-airbench.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from settings import Settings, best_precision
from utils import Batches, Dataset, UsageError, generator


class Muon(torch.optim.AdamW):
    """Muon for a model's filters, AdamW for everything else.

    Filters are the weights of convolutions without a bias; each must be followed by a batch
    normalisation, so that its filters' scale has no effect. Their averaged gradient, as a matrix
    with a row for each filter, is made orthogonal, so that a step moves every direction by as much.
    Before each step a layer's filters are scaled to a norm of 1, in root mean square over them, so
    that `lr`, their learning rate, is relative; `adamw_lr` is that of the rest, with betas of 0.9
    and 0.99 and no weight decay. The average is Nesterov's, with `momentum`. A step clears the
    filters' gradients. Raises UsageError for a model without filters.
    In float16 every step waits for the device, as GradScaler asks whether the gradients are finite.
    Jordan et al., Muon, 2024 (kellerjordan.github.io/posts/muon). torch.optim.Muon takes matrices
    only.
    """

    def __init__(
        self, model: nn.Module, lr: float = 0.1, adamw_lr: float = 5e-3, momentum: float = 0.8
    ):
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is None]
        filters = [m.weight for m in convolutions if m.weight.requires_grad]
        known = {id(p) for p in filters}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        if not filters:
            raise UsageError(f"{type(model).__name__} has no convolution without a bias for Muon.")
        groups = [dict(params=filters, lr=lr, momentum=momentum), dict(params=rest)]
        super().__init__(groups, adamw_lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.defaults |= dict(lr=lr, adamw_lr=adamw_lr, momentum=momentum)

    @property
    def filters(self) -> list[nn.Parameter]:
        """The weights that Muon steps."""
        return self.param_groups[0]["params"]

    @torch.no_grad()
    def step(self):
        """Step the filters, and leave the rest to AdamW."""
        group = self.param_groups[0]
        for weights in self.stacks():
            for weight in weights:
                if not self.state[weight]:  # AdamW asks every state that is loaded for a step
                    average = torch.zeros_like(weight)
                    self.state[weight].update(step=torch.zeros(()), average=average)
            averages = [self.state[weight]["average"] for weight in weights]
            gradients = [weight.grad for weight in weights]
            torch._foreach_mul_(averages, group["momentum"])
            torch._foreach_add_(averages, gradients)
            ahead = torch._foreach_add(gradients, averages, alpha=group["momentum"])  # Nesterov's
            rows = [one.permute(0, 2, 3, 1) for one in ahead]  # as channels_last lies in memory
            matrices = [one.flatten(1) for one in rows]
            if len(matrices) == 1:
                steps = [orthogonal(matrices[0], scale=group["lr"])]
            else:
                steps = orthogonal(torch.stack(matrices), scale=group["lr"])
            norms = torch._foreach_norm(weights)
            for weight, step, norm in zip(weights, steps, norms, strict=True):
                weight.mul_(math.sqrt(len(weight)) / norm.clamp(min=1e-30))  # all may be zero
                weight.sub_(step.view_as(rows[0]).permute(0, 3, 1, 2))
                weight.grad = None  # AdamW passes over what has none
        super().step()

    def stacks(self) -> list[list[Tensor]]:
        """The filters that have a gradient: one by one, or, on a GPU, those of one shape together.

        There it saves launches; on a CPU products of stacks in bfloat16 are slow.
        """
        filters = [weight for weight in self.filters if weight.grad is not None]
        if filters and filters[0].device.type == "cpu":
            return [[weight] for weight in filters]
        shapes = dict.fromkeys(weight.shape for weight in filters)
        return [[weight for weight in filters if weight.shape == shape] for shape in shapes]


def orthogonal(matrix: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """A matrix (M, N) with its singular values brought near `scale`, by Newton and Schulz.

    Or a stack (K, M, N) of them, each on its own. Three steps of a fifth-degree polynomial that is
    steep at zero; the coefficients are Jordan's. Values of a hundredth of the matrix's norm and
    more end between 0.4 and 1.3 times `scale`; smaller ones grow forty times.
    What a step multiplies the matrix by is a polynomial of x x', M by M: the three are multiplied
    out there, and so is the division by the norm, whose square is the trace of x x'. The wide
    matrix itself enters two products and nothing else. In the precision that the hardware
    multiplies natively, and returned so.
    """
    precision, least = best_precision(matrix.device), 1e-14
    if precision == torch.float16:  # in whose range a gradient's products may vanish, or overflow
        matrix, least = matrix / matrix.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7), 1e-4
    x = matrix.to(precision)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    gram = x @ x.mT
    square = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float32)[..., None, None] + least
    gram = (gram / square).to(x.dtype)
    product = factor = _factor(gram)
    for _ in range(2):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    x = (product * (scale / square.sqrt())).to(x.dtype) @ x
    return x.mT if tall else x


def _factor(gram: Tensor) -> Tensor:
    """3.4445 - 4.775 x x' + 2.0315 x x' x x', of the gram matrices x x' (.., M, M)."""
    square = torch.addmm if gram.ndim == 2 else torch.baddbmm
    factor = square(gram, gram, gram, beta=-4.7750, alpha=2.0315)
    factor.diagonal(dim1=-2, dim2=-1).add_(3.4445)
    return factor


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, padded by one pixel, without a bias: (N, inputs, H, W) to outputs.

    On a CPU maps of up to 3x3 pixels are convolved by one matrix product of all patches (im2col),
    for which torch's own convolution is slow: a profile on an Intel Xeon with AMX showed it.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if x.device.type != "cpu" or max(height, width) > 3:
            return super().forward(x)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        places = [(y, x) for y in range(3) for x in range(3)]
        patches = torch.cat([padded[:, y : y + height, x : x + width] for y, x in places], 3)
        return F.linear(patches, self.weight.permute(0, 2, 3, 1).flatten(1)).permute(0, 3, 1, 2)


def with_dice(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Cross-entropy, plus the Dice loss: 1 - 2 overlap / (predictions + truth), mean over classes.

    Logits (N, classes, H, W) and labels int64 (N, H, W) to a number. Predictions are probabilities,
    so each of the three is a sum over the batch's pixels (a process's share of them). However few
    pixels a class has, it counts as much as any; one that the batch lacks adds a constant to the
    loss, and nothing to its gradient. After Milletari et al., V-Net, 2016 (arXiv:1606.04797), who
    have two classes, and sums of squares in the denominator.
    """
    counted = (labels != ignore_index)[:, None]
    classes = torch.arange(logits.shape[1], device=labels.device)[:, None, None]
    truth = (labels[:, None] == classes) & counted
    predictions = logits.float().softmax(1) * counted
    overlap, both = (predictions * truth).sum((0, 2, 3)), (predictions + truth).sum((0, 2, 3))
    dice = 1 - (2 * overlap / both.clamp(min=1)).mean()
    return F.cross_entropy(logits, labels, ignore_index=ignore_index) + dice


def linear_decay(
    optimizer: torch.optim.Optimizer, batches: Batches, epochs: int
) -> torch.optim.lr_scheduler.LinearLR:
    """Learning rates that fall in a line, from what they are to 0 after the last step."""
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * len(batches))


def progressive_sizes(epochs: int) -> list[int]:
    """Sides of images for epochs 1, 2 .., in pixels: from 20, of three epochs or more, to 32.

    A third of the epochs, rounded down, are at 20.
    """
    sides = 20, 20, 24, 24, 28, 32
    return [sides[(len(sides) * epoch - 1) // epochs] for epoch in range(1, epochs + 1)]


class Resized(Batches):
    """`Batches` of smaller images at first: epoch e's are brought to `sizes[e - 1]` pixels a side.

    Progressive resizing: what is coarse is learned from 20x20 pixels as well, at about a third of
    the multiply-adds. Howard, in fast.ai's entry to DAWNBench, 2018. Later epochs have the last
    size. For labels of images.
    With `flip`, flips `alternate`: an image that one epoch mirrors is not mirrored in the next, so
    that any two epochs in a row see both sides of all; the first epoch's are drawn. Jordan, 2024.
    """

    def __init__(self, *arguments, sizes: Sequence[int], alternate: bool = True, **options):
        super().__init__(*arguments, **options)
        self.sizes, self.alternate = tuple(sizes), alternate
        if not self.sizes or self.labels.ndim != 1:
            raise UsageError(f"{self.dataset.name}: give a size, and images with one label each.")

    def side(self, epoch: int) -> int:
        """The side of an epoch's images, in pixels."""
        return self.sizes[min(max(epoch, 1), len(self.sizes)) - 1]

    @property
    def augmentation(self) -> str:
        flips = ", flips alternate" if self.flip and self.alternate else ""
        return f"{super().augmentation}{flips}, sizes {self.sizes}"

    def _flips(self, order: Tensor, draws: torch.Generator) -> Tensor:
        if not (self.flip and self.alternate):
            return super()._flips(order, draws)
        first = torch.randint(2, order.shape, generator=generator(self.seed))
        return (first[order] + self.epoch) % 2

    def __iter__(self):
        size = (self.side(self.epoch),) * 2
        for images, labels in super().__iter__():
            if images.shape[2:] != size:
                images = F.interpolate(images, size, mode="bilinear", antialias=True)
                images = images.contiguous(memory_format=torch.channels_last)
            yield images, labels


class Warped(Batches):
    """`Batches` whose every image is turned, slanted, stretched and moved, each in its own way.

    A random affine map: rotation and shear by up to `degrees` each, either side scaled by up to a
    part `stretch` of it, translation by up to `move` pixels; the border is filled with the top left
    pixel. For square images, and labels of images. After LeCun et al., Gradient-Based Learning
    Applied to Document Recognition, 1998.
    """

    def __init__(self, *arguments, degrees: float, stretch: float, move: float, **options):
        super().__init__(*arguments, **options)
        height, width = self.dataset.images.shape[2:]
        if height != width or self.labels.ndim != 1:
            raise UsageError(f"{self.dataset.name}: only square images with one label are warped.")
        self.degrees, self.stretch, self.move = degrees, stretch, move

    @property
    def augmentation(self) -> str:
        warp = f"degrees {self.degrees}, stretch {self.stretch}, move {self.move}"
        return f"{super().augmentation}, {warp}"

    def __iter__(self):
        draws, radians = generator(self.seed, self.epoch, 1), math.radians(self.degrees)
        move = 2 * self.move / self.dataset.images.shape[-1]
        reach = torch.tensor([radians, radians, self.stretch, self.stretch, move, move])
        drawn = (2 * torch.rand(len(self.dataset), 6, generator=draws) - 1) * reach
        angle, slant, wide, high, across, down = drawn.to(self.device).T
        rows = [(1 + wide) * angle.cos(), slant - (1 + wide) * angle.sin(), across]
        rows += [(1 + high) * angle.sin(), (1 + high) * angle.cos(), down]
        maps = torch.stack(rows, 1).view(-1, 2, 3).split(self.batch_size)
        for (images, labels), some in zip(super().__iter__(), maps, strict=True):
            grid = F.affine_grid(some, list(images.shape), align_corners=False)
            border = images[:, :, :1, :1]
            warped = F.grid_sample(images - border, grid, align_corners=False) + border
            yield warped.contiguous(memory_format=torch.channels_last), labels


class Composed(Batches):
    """`Batches` of MNIST-on-CIFAR-10 whose scenes are made anew in every epoch.

    Of their `layers`: a background is flipped and moved as `Batches` does, and gets another of the
    digits, which are never mirrored, in another colour at another place. The rest is as in
    `utils.compose_scenes`. Raises UsageError for scenes without layers, and for backgrounds that
    are not square, or wider than the digits by an odd number of pixels.
    """

    def __init__(
        self,
        scenes: Dataset,
        batch_size: int,
        run: Settings,
        statistics: tuple[Sequence[float], Sequence[float]] | None = None,
        **options,
    ):
        super().__init__(scenes, batch_size, run, statistics, **options)
        if scenes.layers is None:
            raise UsageError(f"{scenes.name}: scenes without layers can't be made anew.")
        digits, backgrounds = scenes.layers
        self.backgrounds = Batches(backgrounds, batch_size, run, ([0.0] * 3, [1.0] * 3), **options)
        if backgrounds.images.shape != scenes.images.shape:
            raise UsageError(f"{scenes.name}: the scenes are of another size than their layers.")
        height, width = backgrounds.images.shape[2:]
        margin, odd = divmod(width - digits.images.shape[-1], 2)
        if odd or height != width:
            wider = "square, and wider than digits by an even number of pixels"
            raise UsageError(f"{backgrounds.name}: backgrounds must be {wider}.")
        border = (margin + 1,) * 4  # a pixel more, lest reflection reaches a digit's edge
        ink = replace(digits, images=F.pad(digits.images, border))
        self.ink = Batches(ink, batch_size, run, ([0.0], [1.0]), shuffle=True, shift=margin)

    def __str__(self) -> str:
        ink, below = (part.dataset.fingerprint for part in (self.ink, self.backgrounds))
        return f"{super().__str__()}, layers {ink} {below}"

    @property
    def augmentation(self) -> str:
        return f"{super().augmentation}, scenes made anew"

    def __iter__(self):
        self.backgrounds.seed, self.ink.seed = self.seed, self.seed + 1  # of another order
        self.backgrounds.epoch = self.ink.epoch = self.epoch
        draws = generator(self.seed, self.epoch, 1)
        colours = torch.rand(len(self.dataset), 3, 1, 1, generator=draws).to(self.device)
        parts = zip(self.backgrounds, self.ink, colours.split(self.batch_size), strict=True)
        for (images, labels), (ink, numbers), colour in parts:
            ink = ink[..., 1:-1, 1:-1]
            scenes = 255 * images.lerp(colour, ink)
            labels = (len(self.ink.dataset.classes) + labels)[:, None, None]
            maps = torch.where(ink[:, 0] > 0.5, numbers[:, None, None], labels)
            yield self._normalise(scenes.permute(0, 2, 3, 1)), maps


class Views(nn.Module):
    """Test-time augmentation: logits averaged over an image, its moved copies and mirror images.

    Moved by a pixel up and left, and down and right; the two together count as much as the image;
    with `mirror`, each and its mirror image count half. For labels of images. Jordan, 2024.
    """

    def __init__(self, model: nn.Module, mirror: bool = True):
        super().__init__()
        self.model, self.mirror = model, mirror

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), of 2 pixels a side or more, to float32 logits (N, classes)."""
        height, width = images.shape[2:]
        wider = F.pad(images, (1, 1, 1, 1), mode="reflect")
        moved = wider[..., :height, :width], wider[..., 2:, 2:]
        views = [(images, 0.5), *((view, 0.25) for view in moved)]
        if self.mirror:
            views = [(x, w / 2) for view, w in views for x in (view, view.flip(-1))]
        return sum(weight * self.model(view).float() for view, weight in views)
