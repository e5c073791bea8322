"""Every model of the zoo, small: name, input shape, options."""

ZOO = [
    ("mlp", (1, 8, 8), {"hidden": (12, 6)}),
    ("conv2", (1, 12, 12), {"hidden": 40}),
    ("two_cnn", (1, 12, 12), {"hidden": 40}),
    ("conv2_mnist", (1, 28, 28), {}),
    ("lenet5", (1, 28, 28), {}),
    ("vgg11", (3, 32, 32), {"width": 0.125}),
    ("resnet18", (3, 16, 16), {"width": 8, "stem": "cifar"}),
    ("resnet18", (3, 32, 32), {"width": 8, "stem": "imagenet"}),
]
