"""An image network of one's own; importing it brings nothing but torch."""

from torch import nn


class Sum(nn.Module):
    """x + f(x): a block of one's own."""

    def __init__(self, width, after=None):
        super().__init__()
        self.f = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, width, 3, padding=1))
        self.after = after or nn.Identity()

    def forward(self, x):
        return self.after(x + self.f(x))


class Own(nn.Module):
    """Blocks reached by attribute and by list, a plain convolution that is none, and a sequence that holds two."""

    def __init__(self, width=8, classes=3):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.first = Sum(width)
        self.plain = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.several = nn.ModuleList([Sum(width), Sum(width)])
        self.pair = nn.Sequential(Sum(width), Sum(width))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.plain(self.first(self.stem(x)))
        for block in self.several:
            x = block(x)
        return self.head(self.pair(x).mean((2, 3)))
