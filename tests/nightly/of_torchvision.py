"""Architectures of torchvision: its own classes, as shallow and narrow as possible."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from others import CLASSES, Batch, Other, entropy, images, labelled
from torch import Tensor, nn

SIZE = 48  # of an image; BatchNorm needs a last feature map of more than one pixel


def resnet() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], CLASSES)


def resnext() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], CLASSES, groups=8, width_per_group=4)


def convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    return ConvNeXt(blocks, stochastic_depth_prob=0.0, num_classes=CLASSES)


def swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=CLASSES
    )


def swin_v2() -> nn.Module:
    from torchvision.models.swin_transformer import (
        PatchMergingV2,
        SwinTransformer,
        SwinTransformerBlockV2,
    )

    return SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=CLASSES,
        block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2,
    )  # fmt: skip


def maxvit() -> nn.Module:
    from torchvision.models.maxvit import MaxVit

    return MaxVit(
        (32, 32), 8, 4, [8, 16], [1, 1], 8, stochastic_depth_prob=0.0, num_classes=CLASSES
    )


def efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [MBConvConfig(1, 3, 1, 8, 8, 1, 1, 1), MBConvConfig(4, 3, 2, 8, 16, 2, 1, 1)]
    return EfficientNet(blocks, 0.0, stochastic_depth_prob=0.0, num_classes=CLASSES)


def mobilenet_v2() -> nn.Module:
    from torchvision.models.mobilenetv2 import MobileNetV2

    blocks = [[1, 8, 1, 1], [6, 16, 2, 2]]
    return MobileNetV2(CLASSES, 0.25, blocks, dropout=0.0)


def mobilenet_v3() -> nn.Module:
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    blocks = [
        InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1.0),
        InvertedResidualConfig(16, 3, 32, 24, True, "HS", 2, 1, 1.0),
    ]
    return MobileNetV3(blocks, 32, CLASSES, dropout=0.0)


def mnasnet() -> nn.Module:
    from torchvision.models.mnasnet import MNASNet

    return MNASNet(0.25, CLASSES, dropout=0.0)


def densenet() -> nn.Module:
    from torchvision.models.densenet import DenseNet

    return DenseNet(8, (2, 2), 16, drop_rate=0.0, num_classes=CLASSES)


def vgg() -> nn.Module:
    import torch
    from torchvision.models.vgg import VGG, make_layers

    features = make_layers([8, "M", 16, "M", 32, 32, "M"], batch_norm=True)
    with torch.device("meta"):  # do not allocate 120 million weights, as we replace the classifier
        model = VGG(features, CLASSES, init_weights=False, dropout=0.0)
    model.classifier = nn.Sequential(nn.Linear(32 * 49, 32), nn.ReLU(True), nn.Linear(32, CLASSES))
    return model


def shufflenet() -> nn.Module:
    from torchvision.models.shufflenetv2 import ShuffleNetV2

    return ShuffleNetV2([2, 1, 1], [24, 16, 32, 48, 64], CLASSES)


def squeezenet() -> nn.Module:
    from torchvision.models.squeezenet import SqueezeNet

    return SqueezeNet("1_1", CLASSES, dropout=0.0)


def regnet() -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    params = BlockParams.from_init_params(
        depth=4, w_0=8, w_a=8, w_m=2, group_width=8, se_ratio=0.25
    )
    return RegNet(params, CLASSES)


def googlenet() -> nn.Module:
    from torchvision.models.googlenet import GoogLeNet

    return GoogLeNet(CLASSES, aux_logits=True, init_weights=False, dropout=0.0, dropout_aux=0.0)


def _auxiliary(output: Any, targets: Tensor) -> Tensor:
    """The loss of GoogLeNet's three heads, with the weights of its paper."""
    auxiliary = sum(entropy(aux, targets) for aux in (output.aux_logits1, output.aux_logits2))
    return entropy(output.logits, targets) + 0.3 * auxiliary


def _backbone() -> nn.Module:
    from torchvision.models._utils import IntermediateLayerGetter

    return IntermediateLayerGetter(resnet(), {"layer2": "aux", "layer3": "out"})


def deeplab() -> nn.Module:
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
    from torchvision.models.segmentation.fcn import FCNHead

    return DeepLabV3(_backbone(), DeepLabHead(256, CLASSES, (1, 2)), FCNHead(128, CLASSES))


def fcn() -> nn.Module:
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    return FCN(_backbone(), FCNHead(256, CLASSES), FCNHead(128, CLASSES))


def _pixels(output: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """The loss of every pixel, for the head and the auxiliary head."""
    losses = (entropy(output[name].movedim(1, -1), targets) for name in ("out", "aux"))
    return next(losses) + 0.5 * next(losses)


def vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(SIZE, 12, 2, 4, 32, 48, num_classes=CLASSES)


def _other(
    make: Callable[[], nn.Module],
    units: str,
    loss_sum: Callable[[Any, Tensor], Tensor] = entropy,
    *,
    batch: Callable[..., Batch] = images,
    shape: tuple[int, ...] = (3, SIZE, SIZE),
    refused: str = "",
) -> Other:
    expected = {"pp": refused} if refused else {}
    return Other(make, partial(batch, shape=shape), loss_sum, tuple(units.split()), expected)


LARGER = (3, 64, 64)

MODELS: dict[str, Other] = {
    "resnet18": _other(resnet, "BasicBlock"),
    "resnext50": _other(resnext, "Bottleneck"),
    "convnext_tiny": _other(convnext, "CNBlock"),
    "swin_t": _other(swin, "SwinTransformerBlock"),
    "swin_v2_t": _other(swin_v2, "SwinTransformerBlockV2"),
    "maxvit_t": _other(maxvit, "MaxVitLayer", shape=(3, 32, 32)),
    "efficientnet_b0": _other(efficientnet, "MBConv"),
    "mobilenet_v2": _other(mobilenet_v2, "InvertedResidual"),
    "mobilenet_v3": _other(mobilenet_v3, "InvertedResidual"),
    "mnasnet": _other(mnasnet, "_InvertedResidual", shape=LARGER),
    "densenet121": _other(densenet, "_DenseBlock"),
    "vgg11_bn": _other(vgg, "Conv2d"),
    "shufflenet_v2": _other(shufflenet, "InvertedResidual", shape=LARGER),
    "squeezenet1_1": _other(squeezenet, "Fire"),
    "regnet_y": _other(regnet, "ResBottleneckBlock"),
    "googlenet (auxiliary heads)": _other(
        googlenet, "Inception", _auxiliary, shape=LARGER,
        refused="its forward reads self.training",
    ),
    "deeplabv3": _other(deeplab, "BasicBlock ASPP", _pixels, batch=labelled),
    "fcn": _other(fcn, "BasicBlock", _pixels, batch=labelled),
    "vit_b_16": _other(vit, "EncoderBlock"),
}  # fmt: skip
