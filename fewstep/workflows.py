"""The commands as functions: what ``cli`` calls, and what a script may call instead.

What only some of them need and takes long to import (training, several processes) is imported there: sampling a few
images should not wait for it.
"""

import datetime
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from fewstep.block import PrecisionName
from fewstep.checkpoint import DATA_MEAN, RunDirectory, read_model, write_model
from fewstep.config import RunConfig, config_yaml, load_config, read_config, recipe_names
from fewstep.data.config import DataConfig, DigitsConfig
from fewstep.data.dataset import Dataset
from fewstep.data.detect import data_config, detect
from fewstep.data.embedding_files import load_embeddings
from fewstep.data.encoded import Reported, unreported
from fewstep.data.inspect import Inspection, inspect
from fewstep.data.load import load_data
from fewstep.data.pairs import META, shards_of
from fewstep.data.paths import expanded
from fewstep.data.prepare import prepare
from fewstep.distill.reflow.config import PairsSettings
from fewstep.encode import prepare_latents
from fewstep.environment import describe_environment
from fewstep.errors import UsageError, nearest
from fewstep.evaluation.bank import Bank
from fewstep.evaluation.config import EvaluateConfig
from fewstep.evaluation.features import FeatureExtractor, build_extractor
from fewstep.evaluation.imported import read_samples
from fewstep.evaluation.protocol import K_PRECISION_RECALL
from fewstep.evaluation.quantise import to_uint8
from fewstep.evaluation.reference import (
    ReferenceFeatures,
    check_takes,
    feature_moments,
    reference_features,
    write_statistics,
)
from fewstep.evaluation.references import known_references
from fewstep.evaluation.refstats import SUFFIX, write_refstats
from fewstep.evaluation.results import Model, Report
from fewstep.evaluation.share import Share as EvaluationShare
from fewstep.evaluation.sweep import Candidate, Seen, draw, sweep, sweep_images, unseen
from fewstep.files import check_folder, digest, read_json, write_atomic, write_json
from fewstep.graphs import GraphSampler
from fewstep.launch import launched
from fewstep.precision import in_precision
from fewstep.sampling import FieldSampler, MapSampler, OdeSampler, Solver
from fewstep.sources import SOURCES
from fewstep.students.load import LoadedModel, guided_sampler, load_model, takes_guidance, with_guidance
from fewstep.students.maps import GuidanceInput
from fewstep.students.model_card import model_readme
from fewstep.teachers.check import TeacherCheck, check_teacher
from fewstep.teachers.config import CheckpointTeacher, RunTeacher
from fewstep.teachers.convert import write_converted
from fewstep.teachers.foreign import read_checkpoint
from fewstep.teachers.formats.table import FORMATS
from fewstep.teachers.identify import Checkpoint
from fewstep.teachers.inspect import inspect_teacher
from fewstep.teachers.load import Teacher, load_teacher


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Sampling ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampledRun:
    """Samples ``x [n, *D]`` of a run with their labels, and network evaluations per sample."""

    model: LoadedModel
    data: Dataset
    x: Tensor
    label: Tensor | None
    nfe: int


def sample_run(
    run: Path,
    *,
    steps: int,
    n: int,
    seed: int,
    batch_size: int,
    solver: Solver | None = None,
    guidance: GuidanceInput | None = None,
    precision: PrecisionName = "fp32",
    graph: bool = False,
) -> SampledRun:
    """Samples ``0 .. n - 1`` of a seed from a finished run. ``solver`` is for teachers; a student has its own rule.
    ``guidance`` is for teachers with classes and for students that take it as an input, ``precision`` what the network
    is evaluated in. With ``graph`` batches after
    the first are replays of a CUDA graph: the same samples.

    The model says what its samples are like: the data it was trained on need not be there.
    """
    device = default_device()
    config = read_config(run)  # what is no run says so
    model = load_model(run, device)
    if solver is not None:
        model = _with_solver(model, solver)
    if guidance is not None:
        model = with_guidance(model, guidance)
    _check_steps(model, (steps,))
    data = _like_its_data(model.card, config)
    sampler = in_precision(model.sampler, precision)
    if graph:
        assert isinstance(sampler, OdeSampler | MapSampler | FieldSampler)
        sampler = GraphSampler(sampler)
    drawn = draw(sampler, steps, data, n=n, batch_size=batch_size, seed=seed, device=device)
    return SampledRun(model, data, drawn.x, drawn.label, drawn.nfe)


def _like_its_data(card: Mapping[str, Any], config: RunConfig) -> Dataset:
    """A data set without samples, as the one that a model was trained on. Of that only the embeddings have to be there,
    where they are its condition."""
    said, told = card["data"], getattr(config.data, "embeddings", None)
    data = Dataset(said["name"], torch.empty(0, *said["shape"]), None, said["num_classes"], said["kind"])
    return data if told is None else replace(data, embeddings=load_embeddings(expanded(told)))


# Averages ------------------------------------------------------------------------------------------------------------


def average_run(run: Path, out: Path, *, ema: str | None, relative_std: float | None, step: int | None) -> str:
    """Write to ``out`` the model of a finished run under another average of its weights; returns the model's name.

    ``ema`` names one that training tracked; ``relative_std``, at ``step`` or at the end, rebuilds one that it did not.
    What is written can be sampled, evaluated and reported like a run.
    """
    from fewstep.distill.averages import rebuilt, tracked

    if (ema is None) == (relative_std is None):
        raise UsageError("say which average: --ema NAME, or --relative-std WIDTH to rebuild one")
    if ema is not None and step is not None:
        raise UsageError("--at-step goes with --relative-std: tracked averages are those of the last step")
    exported = read_model(run)
    config = read_config(run)
    if set(exported.card["digests"]) - {DATA_MEAN} != {"model.safetensors"}:
        raise UsageError(f"{run} has a model for each of several step counts: their averages are not kept apart")
    directory = RunDirectory(out)
    directory.check(resume=False, overwrite=False)
    if ema is not None:
        label, weights = ema, tracked(RunDirectory(run), config, ema)
    else:
        assert relative_std is not None
        label = f"power-{relative_std:g}" + (f"-step-{step}" if step else "")
        weights = rebuilt(RunDirectory(run), config, relative_std, step)
    named = config.model_copy(update={"name": f"{config.name}-{label}"})
    card = {**exported.card, "name": named.name, "ema": label}
    directory.prepare(resume=False, overwrite=False)
    directory.write_status("done", step=int(card["train"]["steps"]), exit_code=0)
    write_atomic(out / "config.yaml", config_yaml(named))
    readme = model_readme(card, exported.sampler)
    files = {"model.safetensors": weights}
    if DATA_MEAN in exported.card["digests"]:
        files[DATA_MEAN] = exported.weights(DATA_MEAN)
    write_model(directory.model, card, exported.sampler, files, readme)
    return named.name


# Evaluation ----------------------------------------------------------------------------------------------------------


def evaluate_runs(
    runs: Sequence[Path],
    *,
    settings: EvaluateConfig | None = None,
    steps: tuple[int, ...] | None = None,
    seed: int = 0,
    weights: Path | None = None,
    guidance: Sequence[GuidanceInput] = (),
    emas: Sequence[str] = (),
    served_only: bool = False,
    keep: Path | None = None,
    fresh: bool = False,
    report: Seen = unseen,
) -> Report:
    """Sweep finished runs that share a data set, with the teacher of the first student among them as anchor.

    ``settings`` defaults to the ``evaluate`` block of the first run; ``steps`` overrides the step counts of all
    students. Every model is measured at each scale of ``guidance``, which it has to take; a teacher with classes beside
    a student that takes it is guided as the student is. ``emas`` are tracked averages of the first run's weights that
    are measured in the place of the exported ones (``all``: each of them). With ``served_only`` every student is
    measured at those of ``settings.steps`` that it serves, of which there has to be one, instead of at the steps of its
    own config.

    Finished rows are kept in ``keep`` and found there again, unless ``fresh``. Where several processes were launched,
    each draws its share of the samples, and all of them return the report.
    """
    share, device = evaluation_share()
    configs = [read_config(run) for run in runs]
    data_config = configs[0].data
    for run, config in zip(runs, configs, strict=True):
        if config.data != data_config:
            raise UsageError(f"{run} was trained on other data than {runs[0]}: their rows would not compare")
    settings = settings or configs[0].evaluate
    if settings.n < share.world:
        raise UsageError(f"{settings.n} samples are too few for {share.world} processes")
    swept: list[_Swept] = []
    for place, (run, config) in enumerate(zip(runs, configs, strict=True)):
        loaded = [load_model(run, device)] if place or not emas else []
        for ema in tracked_names(config, emas) if not place else ():
            loaded.append(load_average(run, ema, device))
        swept += [_Swept(config, model, given) for model in loaded for given in guidance or (None,)]
    data, extractors, known = _measured_against(settings, data_config, swept[0].model, configs[0], device, weights)

    candidates, facts = [], []
    for each in swept:
        config, model = each.config, each.guided()
        own = steps or config.evaluate.steps
        if model.role == "teacher":
            model = _with_solver(model, settings.solver)
            own = steps or settings.teacher_steps or config.evaluate.steps
        elif served_only:
            own = served_steps(model, settings.steps)
        _check_steps(model, own)
        candidates.append(_candidate(model, own, each.ema))
        facts.append(_facts(model))
    if not any(candidate.role == "teacher" for candidate in candidates):
        config, model = next(
            (each.config, each.model)
            for each in swept
            if each.config.teacher is not None or each.config is swept[-1].config
        )
        if config.teacher is not None and settings.teacher_steps:
            teacher = load_teacher(config.teacher, data_config, data, device)
            for candidate in _beside(model, teacher, settings, guidance):
                candidates.append(candidate)
            facts.append(_teacher_facts(teacher, config))

    names = [(candidate.name, candidate.ema, candidate.guidance, candidate.sampler.name) for candidate in candidates]
    # Under one name there are several rows of one model, not several models.
    kinds = {(candidate.name, candidate.role, candidate.objective) for candidate in candidates}
    if len(set(names)) < len(names) or len({name for name, *_ in kinds}) < len(kinds):
        listed = ", ".join(dict.fromkeys(name for name, *_ in names))
        raise UsageError(f"two of these models have the same name ({listed}): rename one with name=...")
    environment = describe_environment()
    bank = Bank(keep, fresh, {key: value for key, value in environment.items() if key != "threads"})
    rows, reference = sweep(
        candidates,
        data,
        extractors,
        settings,
        seed=seed,
        device=device,
        report=report,
        share=share,
        bank=bank,
        known=known,
        held_out=_held_out(settings, data),
    )
    environment["date"] = datetime.date.today().isoformat()
    if share.world > 1:
        environment["processes"] = share.world
    return Report(tuple(rows), tuple({model.name: model for model in facts}.values()), reference, environment)


def _held_out(settings: EvaluateConfig, data: Dataset) -> Dataset | None:
    """The held-out data of an evaluation; ``UsageError`` unless they are of the shape of the data."""
    if settings.held_out is None:
        return None
    found = load_data(settings.held_out)
    if found.shape != data.shape:
        raise UsageError(f"evaluate.held_out: {found.name} has shape {list(found.shape)}, the data {list(data.shape)}")
    return found


@dataclass(frozen=True)
class _Swept:
    """A model of a run under one guidance; None as it is."""

    config: RunConfig
    model: LoadedModel
    guidance: GuidanceInput | None

    @property
    def ema(self) -> str | None:
        """The average of its weights, where it is not the one that was exported."""
        return self.model.card.get("evaluated_ema")

    def guided(self) -> LoadedModel:
        return self.model if self.guidance is None else with_guidance(self.model, self.guidance)


def evaluation_share() -> tuple[EvaluationShare, torch.device]:
    """This process's place among those that were launched, and its device."""
    if not launched():
        return EvaluationShare(), default_device()
    from fewstep.distill.train import make_accelerator

    accelerator = make_accelerator()
    return EvaluationShare(accelerator.process_index, accelerator.num_processes), accelerator.device


def tracked_names(config: RunConfig, asked: Sequence[str]) -> list[str]:
    """The averages that are asked for, each once; ``all`` are those of the run. Others are a ``UsageError``."""
    names = [average.name for average in config.train.ema]
    unknown = next((name for name in asked if name not in (*names, "all")), None)
    if unknown is not None:
        raise UsageError(f"{config.name} has no average '{unknown}'; {nearest(unknown, names)}")
    return list(dict.fromkeys(name for ask in asked for name in (names if ask == "all" else [ask])))


def load_average(run: Path, ema: str, device: torch.device) -> LoadedModel:
    """A finished run's model with the weights of another tracked average, under its own name."""
    with tempfile.TemporaryDirectory() as folder:
        average_run(run, Path(folder) / "average", ema=ema, relative_std=None, step=None)
        model = load_model(Path(folder) / "average", device)
    return replace(model, name=read_config(run).name, card={**model.card, "evaluated_ema": ema})


def _measured_against(
    settings: EvaluateConfig,
    data_config: DataConfig,
    model: LoadedModel,
    config: RunConfig,
    device: torch.device,
    weights: Path | None,
) -> tuple[Dataset, list[FeatureExtractor], list[ReferenceFeatures]]:
    """Data, extractors, and the references that lie in files: where all of them do, the data need not be there."""
    if not settings.reference:
        data = load_data(data_config)
        return data, ready_extractors(settings, data, device, weights), []
    like = _like_its_data(model.card, config)
    extractors = ready_extractors(settings, like, device, weights)
    known = known_references([expanded(path) for path in settings.reference], extractors, like.shape, device)
    return (like if len(known) == len(extractors) else load_data(data_config)), extractors, known


def evaluate_images(
    path: Path,
    data_config: DataConfig,
    *,
    name: str,
    settings: EvaluateConfig,
    steps: int = 0,
    nfe: int = 0,
    limit: int | None = None,
    weights: Path | None = None,
) -> Report:
    """Measure images of a folder (or archive) or of an ``.npz`` batch against the reference of a data set.

    ``steps`` and ``nfe`` say how they were made, where that is known. ``limit`` takes the first ones. Images of another
    size or number of channels than the data's are a ``UsageError``: how to resize them is not for a measurement to say.
    """
    device = default_device()
    data = load_data(data_config)
    if data.kind != "image":
        raise UsageError(f"{data.name} has {data.kind}, and {path} is measured as images")
    if path.suffix == ".npz":
        images = read_samples(path)
    else:
        samples = load_data(data_source(str(path), labels=False))
        if samples.kind != "image":
            raise UsageError(f"{path} holds {samples.kind}, no images")
        images = torch.cat([to_uint8(samples.samples(rows)) for rows in torch.arange(len(samples.x)).split(4096)])
    if tuple(images.shape[1:]) != data.shape:
        sizes = ["x".join(map(str, shape)) for shape in (images.shape[1:], data.shape)]
        raise UsageError(f"{path} has images of {sizes[0]}, and those of {data.name} are {sizes[1]}")
    images = images[:limit].contiguous()
    settings = settings.model_copy(update={"n": len(images)})
    extractors = ready_extractors(settings, data, device, weights)
    known = known_references([expanded(each) for each in settings.reference], extractors, data.shape, device)
    row, reference = sweep_images(images.to(device), data, extractors, settings, device=device, known=known)
    content = digest(images.numpy().tobytes())
    row = replace(row, model=name, objective="images", sampler="files", steps=steps, nfe=nfe, digest=content)
    facts = Model(name, "student", "images", 0, 0, 0, 0.0)
    environment = {**describe_environment(), "date": datetime.date.today().isoformat()}
    return Report((row,), (facts,), reference, environment)


def ready_extractors(
    settings: EvaluateConfig, data: Dataset, device: torch.device, weights: Path | None = None
) -> list[FeatureExtractor]:
    """The extractors of an evaluation; a ``FewstepError`` where one is missing or does not fit, or samples are few."""
    extractors = [build_extractor(name, device, weights) for name in settings.features]
    for extractor in extractors:
        check_takes(extractor, data)
    if settings.n <= K_PRECISION_RECALL:
        raise UsageError(f"{settings.n} samples are too few: precision and recall need {K_PRECISION_RECALL + 1}")
    return extractors


def write_results(path: Path, report: Report) -> None:
    write_json(path, report.to_json())


def _check_steps(model: LoadedModel, steps: Sequence[int]) -> None:
    for count in steps:
        try:
            model.sampler.check(count)
        except ValueError as error:
            raise UsageError(f"{model.name}: {error}") from error


def served_steps(model: LoadedModel, steps: Sequence[int]) -> tuple[int, ...]:
    """Those of the step counts that a model was made for; none at all is a ``UsageError``."""
    served, why = [], ""
    for count in steps:
        try:
            model.sampler.check(count)
            served.append(count)
        except ValueError as error:
            why = str(error)
    if not served:
        raise UsageError(f"{model.name} serves none of the steps {', '.join(map(str, steps))}: {why}")
    return tuple(served)


def _candidate(model: LoadedModel, steps: tuple[int, ...], ema: str | None) -> Candidate:
    return Candidate(
        name=model.name,
        role="teacher" if model.role == "teacher" else "student",
        objective=model.objective,
        sampler=model.sampler,
        steps=steps,
        guidance=model.guidance,
        digest=model.digest,
        params=model.params,
        ema=ema,
    )


def _with_solver(model: LoadedModel, solver: Solver) -> LoadedModel:
    """The same teacher, or straightened flow, under another solver; other students have none: ``UsageError``."""
    if isinstance(model.sampler, FieldSampler) and any(each.steps == 0 for each in model.sampler.fields):
        return replace(model, sampler=replace(model.sampler, rule=solver))
    if not isinstance(model.sampler, OdeSampler):
        raise UsageError(f"{model.name} is a student with its own sampling rule: --solver is for teachers")
    return replace(model, sampler=replace(model.sampler, solver=solver))


def _beside(
    model: LoadedModel, teacher: Teacher, settings: EvaluateConfig, guidance: Sequence[GuidanceInput]
) -> list[Candidate]:
    """The teacher of a student; guided as the student is, where guidance is an input of the one and the other has
    something to be guided by."""
    beside = _teacher_candidate(teacher, settings.teacher_steps, settings.solver)
    if teacher.contrast is None or not takes_guidance(model.card):
        return [beside]
    sampler = _teacher_sampler(teacher, settings.solver)
    return [
        replace(beside, sampler=guided_sampler(sampler, teacher.contrast, given), guidance=given.scale)
        for given in guidance or (GuidanceInput(1.0),)
    ]


def _teacher_sampler(teacher: Teacher, solver: Solver) -> OdeSampler:
    return OdeSampler(teacher.field, solver, SOURCES[teacher.noise.source])


def _teacher_candidate(teacher: Teacher, steps: tuple[int, ...], solver: Solver) -> Candidate:
    return Candidate(
        name=teacher.name,
        role="teacher",
        objective=teacher.objective,
        sampler=_teacher_sampler(teacher, solver),
        steps=steps,
        guidance=teacher.guidance,
        digest=teacher.digest,
        params=teacher.params,
    )


def _facts(model: LoadedModel) -> Model:
    return Model(
        name=model.name,
        role="teacher" if model.role == "teacher" else "student",
        objective=model.objective,
        params=model.params,
        teacher_digest=model.card["teacher_digest"],
        **_training_facts(model.card["train"]),
    )


def _training_facts(train: Mapping[str, Any]) -> dict[str, Any]:
    """What a card says of a training, in the words of results. Cards of before devices were recorded name none."""
    return {
        "train_steps": train["steps"],
        "train_samples": train["samples"],
        "train_s": train["seconds"],
        "processes": train.get("processes", 1),
        "device": train.get("device"),
        "device_type": train.get("device_type"),
        "device_s": train.get("device_seconds"),
    }


def _teacher_facts(teacher: Teacher, config: RunConfig) -> Model:
    if config.teacher is not None and config.teacher.kind == "run":
        trained = read_model(Path(config.teacher.path)).card["train"]
    else:
        trained = {"steps": 0, "samples": 0, "seconds": 0.0}
    return Model(teacher.name, "teacher", teacher.objective, teacher.params, **_training_facts(trained))


# Teachers ------------------------------------------------------------------------------------------------------------


def teacher_check(source: str, overrides: Sequence[str], *, n: int, seed: int) -> TeacherCheck:
    """Whether the teacher of a config is read right, on the config's data."""
    config = load_config(source, overrides)
    if config.teacher is None:
        raise UsageError(f"{source} has no teacher block: there is nothing to check")
    data = load_data(config.data)
    teacher = load_teacher(config.teacher, config.data, data, default_device())
    return check_teacher(teacher, data, n=n, seed=seed)


def teacher_convert(
    path: Path, kind: str | None, out: Path | None, *, weights: str, trust: bool, architecture: Mapping[str, Any]
) -> tuple[Path, Checkpoint]:
    """A checkpoint of another project as safetensors and JSON; returns the folder, and what was found."""
    if kind is None:
        found = inspect_teacher(path, trust=trust, architecture=dict(architecture))
        if len(found.kinds) > 1:
            raise UsageError(f"{path} could be {' or '.join(found.kinds)}: say which by --kind")
        kind = found.kind
    try:
        config = CheckpointTeacher.model_validate(
            {"kind": kind, "path": str(path), "weights": weights, "trust_pickle": trust, "architecture": architecture}
        )
    except ValidationError as error:
        raise UsageError(f"no checkpoint kind {kind}; {nearest(kind, FORMATS)}") from error
    checkpoint = read_checkpoint(config)
    return write_converted(checkpoint, out), checkpoint


# Data ----------------------------------------------------------------------------------------------------------------


def data_source(source: str, **options: Any) -> DataConfig:
    """The data config that a path stands for (what lies there is found by looking), or that of a recipe or YAML file.

    ``options`` are fields of a data config; None leaves one as it is.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if source in recipe_names() or source.endswith((".yaml", ".yml")):
        config = load_config(source).data
        fields = type(config).model_fields
        unknown = next((name for name in given if name not in fields), None)
        if unknown is not None:
            raise UsageError(f"{source}: data of kind {config.kind} have no {unknown}; they have {', '.join(fields)}")
        return type(config).model_validate({**config.model_dump(), **given})
    return data_config(source, detect(expanded(source)), **given)


def prepare_data(
    config: DataConfig,
    out: Path,
    *,
    encoder: Path | None,
    shard_size: int | None,
    overwrite: bool,
    report: Reported = unreported,
) -> dict[str, Any]:
    """Write data as shards, or through an autoencoder as shards of latents; returns their ``meta.json``."""
    if encoder is None:
        return prepare(config, out, shard_size=shard_size, overwrite=overwrite, report=report)
    return prepare_latents(
        config, encoder, out, device=default_device(), shard_size=shard_size, overwrite=overwrite, report=report
    )


def solve_pairs(
    run: Path,
    out: Path,
    *,
    count: int,
    solver: Solver,
    steps: int,
    guidance: float,
    window: tuple[float, float],
    seed: int,
    batch_size: int,
    shard_size: int,
    overwrite: bool,
    resume: bool,
    report: Reported = unreported,
) -> dict[str, Any]:
    """Make pairs with a finished run's velocity field, in as many processes as were launched; returns their
    ``meta.json``. ``report`` hears of this process's share."""
    from fewstep.distill.reflow.pairs import Share, guided_by, make_pairs, request_of
    from fewstep.distill.train import make_accelerator

    accelerator = make_accelerator()
    share = Share(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    data = _like_its_data(read_model(run).card, read_config(run))
    teacher = load_teacher(RunTeacher(path=str(run)), DigitsConfig(), data, accelerator.device)
    field = guided_by(teacher, guidance, window)
    request = request_of(
        PairsSettings(count=count, solver=solver, steps=steps, shard_size=shard_size),
        data,
        teacher=teacher.name,
        teacher_digest=teacher.digest,
        source=teacher.noise.source,
        seed=seed,
        guidance=guidance,
        window=window,
    )
    own = sum(shard.count for shard in shards_of(request)[share.rank :: share.world])
    made = make_pairs(
        out,
        request,
        field,
        batch_size=batch_size,
        device=accelerator.device,
        resume=resume,
        overwrite=overwrite,
        share=share,
        embeddings=data.embeddings,
    )
    for done in made:
        report(done, own)
    return read_json(out / META)


def data_statistics(
    config: DataConfig, out: Path | None, *, features: str | None, weights: Path | None, report: Reported = unreported
) -> Inspection:
    """What ``inspect`` finds; with ``features`` also their mean and covariance, written to ``out``."""
    if (features is None) != (out is None):
        raise UsageError("--features and --out go together: the statistics of features are written to a file")
    if features is None or out is None:
        return inspect(config, report)
    check_folder(out.absolute().parent)
    device = default_device()
    extractor = build_extractor(features, device, weights)
    found = inspect(config)
    if out.name.endswith(SUFFIX):
        data = load_data(config)
        check_takes(extractor, data)
        reference = reference_features(extractor, data, device)
        write_refstats(out, reference, dataset=data.name, dataset_digest=found.digest, kind=data.kind)
        return found
    measured = feature_moments(extractor, load_data(config), device, report)
    facts = {"features": extractor.name, "extractor_digest": extractor.digest}
    write_statistics(out, measured, {**facts, "dataset": found.name, "dataset_digest": found.digest})
    return found
