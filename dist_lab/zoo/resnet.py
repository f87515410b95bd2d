"""ResNet-18 (He et al. 2015, arXiv:1512.03385), torchvision's, with the stem that small images get.

Its own stem halves the image twice before the first block: right for 224 pixels, and nothing would
be left of 32. For images of that size it is customary, as in section 4.2 of the paper, to begin
with a 3 x 3 convolution of stride 1 and no max-pooling. All else is torchvision's, parameter names
included. It is the model of the zoo with buffers: BatchNorm keeps running statistics, and in
training normalizes by those of the rows that it sees, which is where a parallel run may differ.

Letters: B images, C channels, V classes.
"""

import math

import torch
from torch import Tensor, nn

from dist_lab.torchvision_import import fix_torchvision


class ResNet18(nn.Module):
    """images (B, C, height, width) of the dtype of the weights -> logits (B, V). 11 M parameters.

    Sides of 9 or more leave 2 x 2 pixels after the three halvings, so that BatchNorm has something
    to average even where a rank sees one image.
    """

    reads = "images"
    units = tuple(f"layer{i}.{j}" for i in range(1, 5) for j in range(2))  # its BasicBlocks
    ends = ("conv1", "fc")
    stages = (
        "conv1", "bn1", "relu", "layer1.*", "layer2.*", "layer3.*", "layer4.*", "avgpool",
        "flatten", "fc",
    )  # fmt: skip

    def __init__(self, classes: int, *, image: tuple[int, int, int]):
        super().__init__()
        fix_torchvision()
        from torchvision.models import resnet18  # here: it takes a second that no other model needs

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
        """Convolutions Normal(0, sqrt(2 / fan-out)) (He et al. 2015, arXiv:1502.01852), the head
        Normal(0, 1/sqrt(columns)), norms one, biases zero.
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
        """The statistics of nothing seen: mean 0, variance 1, 0 batches."""
        buffer.fill_(1 if fqn.endswith("running_var") else 0)
