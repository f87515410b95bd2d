"""torchvision's ResNet-18 (He et al. 2015, arXiv:1512.03385) with a stem for small images.

The original stem halves the image twice before the first block, which suits 224 pixels but leaves
too little of 32. For small images it is customary, as in section 4.2 of the paper, to start with a
3 x 3 convolution of stride 1 and no max-pooling. Everything else is torchvision's, including
parameter names. It is the only model here with buffers: BatchNorm keeps running statistics. In
training it normalizes by the statistics of the samples on its rank, so a parallel run may differ
from one process.

Letters: B images, C channels, V classes.
"""

import math

import torch
from torch import Tensor, nn

from dist_lab.torchvision_import import fix_torchvision


class ResNet18(nn.Module):
    """images (B, C, height, width) in the dtype of the weights -> logits (B, V). 11 M parameters.

    Height and width must be 9 or more. Then 2 x 2 pixels are left after three halvings, and
    BatchNorm can compute a variance even if a rank has a single image.
    """

    reads = "images"
    units = tuple(f"layer{i}.{j}" for i in range(1, 5) for j in range(2))  # the BasicBlocks
    ends = ("conv1", "fc")
    stages = (
        "conv1", "bn1", "relu", "layer1.*", "layer2.*", "layer3.*", "layer4.*", "avgpool",
        "flatten", "fc",
    )  # fmt: skip

    def __init__(self, classes: int, *, image: tuple[int, int, int]):
        super().__init__()
        fix_torchvision()
        from torchvision.models import resnet18  # here, because the import takes a second

        theirs = resnet18(num_classes=classes)
        self.conv1 = nn.Conv2d(image[0], 64, kernel_size=3, padding=1, bias=False)
        self.bn1, self.relu = theirs.bn1, theirs.relu
        self.layer1, self.layer2 = theirs.layer1, theirs.layer2
        self.layer3, self.layer4 = theirs.layer3, theirs.layer4
        self.avgpool, self.flatten, self.fc = theirs.avgpool, nn.Flatten(), theirs.fc

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))  # (B, C, height, width) -> (B, 64, ..., ...)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # -> (B, 512, .../8, .../8)
        return self.fc(self.flatten(self.avgpool(x)))  # -> (B, 512, 1, 1) -> (B, 512) -> (B, V)

    def init_weight(self, fqn: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Convolutions are Normal(0, sqrt(2 / fan-out)), after He et al. 2015, arXiv:1502.01852.

        The head is Normal(0, 1/sqrt(columns)), norms are 1 and biases 0.
        """
        if fqn.endswith("bias"):
            tensor.zero_()
        elif tensor.ndim == 1:
            tensor.fill_(1.0)
        elif tensor.ndim == 2:
            tensor.normal_(0.0, tensor.size(1) ** -0.5, generator=generator)
        else:
            fan_out = tensor.size(0) * tensor[0, 0].numel()
            tensor.normal_(0.0, math.sqrt(2 / fan_out), generator=generator)

    def init_buffer(self, fqn: str, buffer: Tensor) -> None:
        """Initial running statistics: mean 0, variance 1, 0 batches."""
        buffer.fill_(1 if fqn.endswith("running_var") else 0)
