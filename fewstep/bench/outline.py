"""What a run consists of, from its config alone: networks, shapes and classes, trained or not, here or not."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from fewstep.checkpoint import read_model
from fewstep.config import RunConfig, load_config, recipe_names
from fewstep.data.load import load_data
from fewstep.distill.config import FlowMatchingConfig
from fewstep.errors import UsageError
from fewstep.networks.config import NetworkConfig
from fewstep.students.initialise import network_of
from fewstep.teachers.config import AnalyticTeacher, NoiseConfig, PythonTeacher, RunTeacher, TeacherConfig


@dataclass(frozen=True)
class Outline:
    """A run without its data and weights. ``teacher`` and ``weak`` are the teachers' networks, None where there is
    none or its cost is not known; ``assumed`` says in sentences what was not found and taken for granted."""

    config: RunConfig
    shape: tuple[int, ...]
    classes: int
    student: NetworkConfig
    teacher: NetworkConfig | None
    weak: NetworkConfig | None
    noise: NoiseConfig
    assumed: tuple[str, ...]


def outline(config: RunConfig, shape: tuple[int, ...] | None = None, classes: int | None = None) -> Outline:
    """Find shape, classes and networks; ``shape`` and ``classes`` stand in for data that are not here.

    A teacher that is not trained yet has the network of its recipe, if it lies where that puts it, or else the
    student's. What cannot be known is a ``UsageError`` that names it.
    """
    assumed: list[str] = []
    if shape is None:
        shape, found = _data(config)
        classes = found if classes is None else classes
    elif classes is None:
        classes = 0
        assumed.append("no classes, since --shape was given without --classes")
    teacher, weak, noise = None, None, NoiseConfig()
    if config.teacher is not None:
        teacher, noise = _teacher(config.teacher, config, assumed)
        if isinstance(config.teacher, RunTeacher) and config.teacher.weak is not None:
            weak, _ = _teacher(config.teacher.model_copy(update={"path": config.teacher.weak}), config, assumed)
    elif isinstance(config.objective, FlowMatchingConfig):
        noise = config.objective.noise
    if teacher is None and config.student.network is None:
        raise UsageError("student.network is not given and there is no teacher to take it from")
    return Outline(config, shape, classes, network_of(config.student, teacher), teacher, weak, noise, tuple(assumed))


def _data(config: RunConfig) -> tuple[tuple[int, ...], int]:
    try:
        data = load_data(config.data)
    except UsageError as error:
        raise UsageError(f"{error}; without the data, give --shape C,H,W and --classes") from error
    if data.embeddings is not None:
        raise UsageError("data.embeddings: what networks make of them is not planned for yet")
    return data.shape, data.num_classes


def _teacher(teacher: TeacherConfig, config: RunConfig, assumed: list[str]) -> tuple[NetworkConfig | None, NoiseConfig]:
    """The network of a teacher and the noise it was trained on."""
    if isinstance(teacher, AnalyticTeacher | PythonTeacher):
        assumed.append(f"the {teacher.kind} teacher costs nothing: it is no network whose size is known")
        return None, NoiseConfig()
    if not isinstance(teacher, RunTeacher):
        return _student_like(f"the teacher {teacher.path}", config, assumed), teacher.noise
    path = Path(teacher.path)
    copied = config.student.init == "teacher" and config.student.network is not None
    if path.exists():
        card = read_model(path).card
        network: NetworkConfig = TypeAdapter(NetworkConfig).validate_python(card["network"])
        if copied and network != config.student.network:
            raise UsageError(f"student.network differs from that of the teacher {path}, which the student starts from")
        return network, NoiseConfig.model_validate(card.get("noise", {}))
    if not copied and path == Path("runs") / path.name and path.name in recipe_names():
        recipe = load_config(path.name)
        assert isinstance(recipe.objective, FlowMatchingConfig)
        if recipe.student.network is not None:
            assumed.append(f"the teacher {path} is not trained: its network is that of the recipe {path.name}")
            return recipe.student.network, recipe.objective.noise
    return _student_like(f"the teacher {path}", config, assumed), NoiseConfig()


def _student_like(what: str, config: RunConfig, assumed: list[str]) -> NetworkConfig:
    """The student's own network in the place of a teacher's that cannot be read here."""
    if config.student.network is None:
        raise UsageError(
            f"{what} is not there, or not of a kind that plans read, so its network has to be named: give "
            "student.network, for example student.network.size=flot-small"
        )
    assumed.append(f"{what} has the student's network")
    return config.student.network
