"""The stages of the cifar10-jpeg evidence: which recipes they train, and how small each is at the small sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
RECIPES = HERE / "recipes"
CLASSIFIER = HERE / "classifier"
"""The feature classifier that ships."""

TEACHERS = ("flot", "flot-afm", "unet", "unet-afm")
STUDENTS = (
    "progressive",
    "meanflow",
    "meanflow-teacher",
    "meanflow-scratch",
    "soflow",
    "lagrangian",
    "consistency",
    "reflow",
)
TAUGHT = tuple(name for name in STUDENTS if name != "meanflow-scratch")
"""Students that have a teacher."""

GOALS = (
    "fd_classifier=1.05*teacher@4",
    "fd_classifier=1.25*teacher@1",
    "recall_classifier=teacher-0.02@4",
    "latency_ms=0.05*teacher@4",
)
"""What the table is held to, for some student each, against the teacher at its most steps."""

STAGES: Mapping[str, str] = {
    "classifier": "train the feature classifier again (one ships with its accuracy)",
    "flot": "teacher: FloT",
    "flot-afm": "teacher: FloT, weights by the curvature of its flow",
    "unet": "teacher: U-Net of as many parameters",
    "unet-afm": "teacher: U-Net, weights by the curvature of its flow",
    "teachers": "measure the teachers that there are, side by side",
    "progressive": "student: progressive distillation to 4, 2, 1 steps",
    "meanflow": "student: MeanFlow from data",
    "meanflow-teacher": "student: MeanFlow from the teacher",
    "meanflow-scratch": "MeanFlow from data without any teacher",
    "soflow": "student: SoFlow, from data",
    "lagrangian": "student: Lagrangian map distillation",
    "consistency": "student: easy consistency tuning",
    "reflow": "student: reflow, then distillation to one step",
    "students": "measure the teacher and the students that there are, side by side",
    "report": "the reports, and the goals",
    "all": "all of the above, one after the other",
}
"""Every stage, in order, with what it does."""

FAMILY = {"flot": "flot", "flot-afm": "flot", "unet": "unet", "unet-afm": "unet", "meanflow-scratch": "unet"}
"""Whose network a recipe describes, where it describes one."""


@dataclass(frozen=True)
class Size:
    """How large everything is: overrides of all recipes, of those with a network of their own by its family, and of
    single stages; ``n`` samples per row; the steps of students and of teachers; arguments of the classifier, and
    whether that is the one whose features are taken, in the place of the one that ships."""

    n: int
    steps: tuple[int, ...]
    teacher_steps: tuple[int, ...]
    classifier: tuple[str, ...]
    own_classifier: bool = False
    features: tuple[str, ...] = ("pixels",)
    precision: str = "fp32"
    common: tuple[str, ...] = ()
    taught: tuple[str, ...] = ()
    networks: Mapping[str, str] = field(default_factory=dict)
    of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def overrides(self, stage: str) -> list[str]:
        """The overrides of a recipe's stage."""
        found = [*self.common, *self.of.get(stage, ())]
        if stage in TAUGHT:
            found += self.taught
        if stage in FAMILY and FAMILY[stage] in self.networks:
            found.append(f"student.network={self.networks[FAMILY[stage]]}")
        return found


_EAGER = ("train.precision=fp32", "train.compile=false")

SIZES = {
    "full": Size(
        n=10_000,
        steps=(1, 2, 4, 8),
        teacher_steps=(1, 2, 4, 8, 16, 32, 100),
        classifier=("--steps", "6250", "--batch-size", "128", "--widths", "32,64,128,256", "--precision", "bf16"),
        precision="bf16",
    ),
    # Minutes on two cores: that everything runs, nothing more.
    "tiny": Size(
        n=100,
        steps=(1, 2, 4),
        teacher_steps=(1, 8),
        classifier=("--steps", "20", "--batch-size", "32", "--widths", "16,16", "--max-images", "512"),
        common=(
            *_EAGER,
            "data.max_images=512",
            "train.steps=10",
            "train.batch_size=16",
            "train.warmup_steps=2",
            "train.checkpoint_every=5",
            "train.log_every=5",
        ),
        taught=("teacher.precision=fp32",),
        networks={
            "flot": "{kind: flot, width: 64, depth: 2, heads: 2, patch: 4}",
            "unet": "{kind: unet, channels: 32, multipliers: [1, 1], blocks: 1, attention: [], head_channels: 32}",
        },
        of={
            "reflow": ("objective.pairs.count=64", "objective.pairs.steps=4", "objective.pairs.batch_size=64"),
            "progressive": ("objective.substeps=1",),
        },
    ),
    # Seconds, on images of 8x8: for the test suite.
    "smallest": Size(
        n=24,
        steps=(1, 4),
        teacher_steps=(1, 4),
        classifier=("--steps", "2", "--batch-size", "8", "--widths", "8", "--max-images", "40", "--size", "8"),
        own_classifier=True,
        common=(
            *_EAGER,
            "data.max_images=40",
            "data.size=8",
            "train.steps=2",
            "train.batch_size=4",
            "train.warmup_steps=1",
            "train.checkpoint_every=1",
            "train.log_every=1",
        ),
        taught=("teacher.precision=fp32",),
        networks={
            "flot": "{kind: flot, width: 32, depth: 1, heads: 2, patch: 4}",
            "unet": "{kind: unet, channels: 32, multipliers: [1, 1], blocks: 1, attention: [], head_channels: 32}",
        },
        of={
            "reflow": ("objective.pairs.count=8", "objective.pairs.steps=2", "objective.pairs.batch_size=8"),
            "progressive": ("objective.substeps=1",),
        },
    ),
}
