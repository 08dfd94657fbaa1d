"""After one step, all that trains has a gradient: DDP waits for each."""

import pytest
import torch

from litflora import ClassificationModule, DetectionModule, SegmentationModule
from litflora.adapters import BitFit, FLoRA, Full, LoRA, NormTuning, Probe
from litflora.heads.detectors import DETECTORS
from litflora.heads.segmentation import HEADS

pytestmark = pytest.mark.filterwarnings("ignore:weights is null", "ignore:.*self.trainer")

SIZE = 64
BACKBONES = ("test_vit", "test_convnext")
TUNINGS = (Full, Probe, BitFit, NormTuning, LoRA, FLoRA)
PLAIN = ("classification", "linear", "fcos")  # with each tuning; the others need no repetition
KINDS = ("classification", *HEADS, *DETECTORS)
# Of a plain ViT's pyramid it reads two maps, and so takes none.
CASES = [
    (kind, backbone, tuning)
    for kind in KINDS
    for backbone in BACKBONES
    for tuning in TUNINGS
    if (kind, backbone) != ("deeplabv3plus", "test_vit")
]


def objects(count):
    """Of a training image."""
    boxes = torch.tensor([[4.0, 4, 40, 40], [20, 20, 60, 60]])[:count]
    masks = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    return {"boxes": boxes, "labels": torch.zeros(count, dtype=torch.long), "masks": masks}


def made(kind, backbone, tuning):
    """The module, in training, with all options that could leave something out."""
    options = {"weights": None, "img_size": SIZE, "tuning": tuning(), "drop_path": 0.5}
    if kind == "classification":
        module = ClassificationModule(backbone, 3, mixup=0.2, cutmix=0.2, **options)
    elif kind in HEADS:
        losses = {"cross_entropy": 1.0, "dice": 1.0}
        module = SegmentationModule(backbone, 3, head=kind, head_width=64, losses=losses, **options)
    else:
        module = DetectionModule(backbone, 3, detector=kind, head_width=64, **options)
    module.configure_model()
    return module.train()


def targets(kind):
    """What one batch after the other has to teach."""
    if kind == "classification":
        return [torch.tensor([0, 1])]
    if kind in HEADS:
        ignored = torch.full((2, SIZE, SIZE), 255)
        return [torch.randint(0, 3, (2, SIZE, SIZE)), ignored]
    return [[objects(2), objects(1)], [objects(0), objects(1)], [objects(0), objects(0)]]


def idle(module, target):
    module.zero_grad()
    images = torch.rand(2, 3, SIZE, SIZE)
    module.training_step((images, target), 0).backward()
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    assert trained
    return [name for name, parameter in trained if parameter.grad is None]


@pytest.mark.parametrize(
    ("kind", "backbone", "tuning"),
    [
        pytest.param(*case, marks=[] if case[0] in PLAIN or case[2] is Full else pytest.mark.slow)
        for case in CASES
    ],
)
def test_all_that_trains_has_a_gradient(kind, backbone, tuning):
    torch.manual_seed(0)
    module = made(kind, backbone, tuning)
    for target in targets(kind):
        assert idle(module, target) == []
