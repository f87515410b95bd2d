"""A healthy model, and models with one problem each that doctor should find."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 64
CLASSES = 5


class Block(nn.Module):
    """132,864 bytes in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Residual(nn.Module):
    """Four blocks, with the attribute `stages` for pp."""

    stages = ("embed", "blocks.*", "head")

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(20, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Healthy(Residual):
    """Residual with a plan for tp."""

    def tp_plan(self) -> dict[str, str]:
        return {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}


class Between(nn.Module):
    """Two layers with the given module between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between = nn.Linear(20, WIDTH), between
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.first(x)))


class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :7]


class KeepsItsMean(nn.Module):
    """Has a buffer that forward changes and on which no output depends."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * x.detach().mean(0)
        return x


class InFloat32(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.eye(WIDTH, dtype=torch.float32)


class Words(nn.Module):
    """An embedding of `tokens` x 64 x 4 bytes, and a head that may be tied to it."""

    def __init__(self, tokens: int = 500, *, tied: bool = False, **options: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, WIDTH, **options)
        self.block = Block()
        self.head = nn.Linear(WIDTH, tokens, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens)))


class HalfUsed(nn.Module):
    """Three layers, of which forward never uses the second: 16,640 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused = nn.Linear(20, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)))


class ThreeRows(nn.Module):
    """Its only weight has three long rows: 3 x 20,000 x 4 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(20_000, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x.repeat(1, 1000))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(20, 16, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(torch.stack([x, -x], 1))[0][:, -1])


class Rough(nn.Module):
    """Six BatchNorms, each of which may divide by a variance of almost zero."""

    def __init__(self) -> None:
        super().__init__()
        pairs = ((nn.Linear(20, 20, bias=False), nn.BatchNorm1d(20)) for _ in range(6))
        self.layers = nn.Sequential(*(layer for pair in pairs for layer in pair))
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def rows(n: int = 16, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 20, generator=generator)
    return x, torch.randint(0, classes, (n,), generator=generator)


def tokens(n: int = 16, most: int = 500) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randint(0, most, (n,), generator=generator) for _ in range(2))


def healthy() -> tuple[nn.Module, object]:
    return Healthy(), rows()


def raising() -> nn.Module:
    raise ValueError("no such file\nas that")


def nothing() -> None:
    return None


def odd_batch() -> tuple[nn.Module, object]:
    return Healthy(), torch.zeros(3)


no_function = 3
built = Healthy()
