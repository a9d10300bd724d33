"""Config of data sets. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from fewstep.block import Block


class DigitsConfig(Block):
    """The shipped UCI handwritten digits: 1,797 grey images of 8x8 pixels in ten classes."""

    kind: Literal["digits"] = "digits"


class ToyConfig(Block):
    """A toy distribution in one or two dimensions, ``count`` points of it drawn with ``seed``, with their classes or
    without."""

    kind: Literal["toy"] = "toy"
    name: Literal["checkerboard", "two_moons", "eight_gaussians", "mixture", "mixture_1d"]
    count: int = Field(20_000, ge=100)
    seed: int = 0
    classes: bool = True


class FilesConfig(Block):
    """What all data that lie in files have in common.

    Environment variables in ``path`` are expanded when the data are loaded. ``name`` defaults to the end of the path.
    ``labels``: None takes classes where there are any, true insists on them, false ignores them. ``flip`` mirrors half
    of all samples, each time they are drawn. ``max_images`` keeps the first ones. ``resident`` says where the samples
    stay during training: on the device, on the host (from where a thread fetches batches ahead), or wherever they fit.
    ``embeddings`` is a safetensors file, or a folder of them, with the condition of each sample, instead of a class.
    ``num_classes`` is how many classes there are where these data do not show all of a teacher's.
    """

    path: str = Field(min_length=1)
    name: str | None = Field(None, min_length=1)
    labels: bool | None = None
    flip: bool = False
    max_images: int | None = Field(None, ge=1)
    resident: Literal["auto", "device", "host"] = "auto"
    embeddings: str | None = Field(None, min_length=1)
    num_classes: int | None = Field(None, ge=1)


class ImagesConfig(FilesConfig):
    """Encoded images. ``size`` resizes the shorter side (with antialiasing) and crops the centre to a square; without
    it all images have to be of one size. ``channels`` converts to grey (1) or colour (3). A broken image is an error,
    or left out and counted with ``skip_broken``."""

    size: int | None = Field(None, ge=1, le=65_536)
    channels: Literal[1, 3] | None = None
    skip_broken: bool = False


class FolderConfig(ImagesConfig):
    """A folder of images: one folder per class, all in one place, or any tree with a ``dataset.json`` (EDM)."""

    kind: Literal["folder"] = "folder"


class ZipConfig(ImagesConfig):
    """A zip archive of what ``folder`` reads: EDM's and StyleGAN's data sets."""

    kind: Literal["zip"] = "zip"


class ParquetConfig(ImagesConfig):
    """Hugging Face parquet: a file, a folder of them, or a pattern such as ``data/train-*.parquet``.

    Columns are found by their usual names unless given.
    """

    kind: Literal["parquet"] = "parquet"
    image_column: str | None = None
    label_column: str | None = None


class WebDatasetConfig(ImagesConfig):
    """Tar archives in which the files of a sample share a name up to the first dot: a file, a folder or a pattern."""

    kind: Literal["webdataset"] = "webdataset"


class ShardsConfig(FilesConfig):
    """What ``fewstep data prepare`` wrote: images or latents, read through the memory map."""

    kind: Literal["shards"] = "shards"


class LatentsConfig(FilesConfig):
    """Latents of an autoencoder: our shards, LightningDiT's, or the ``img-mean-std-*.npy`` of EDM2 and REPA.

    A sample is ``(latent - shift) * scale``, both one number or one per channel. They default to what the files say:
    the statistics beside LightningDiT's shards, EDM2's constants for its trees, 0.18215 and 0 for REPA's ``vae-sd``.
    ``flip`` takes the mirrored copies, since a latent cannot be mirrored itself.
    """

    kind: Literal["latents"] = "latents"
    scale: tuple[float, ...] | float | None = None
    shift: tuple[float, ...] | float | None = None


DataConfig = Annotated[
    DigitsConfig
    | ToyConfig
    | FolderConfig
    | ZipConfig
    | ParquetConfig
    | WebDatasetConfig
    | ShardsConfig
    | LatentsConfig,
    Field(discriminator="kind"),
]
