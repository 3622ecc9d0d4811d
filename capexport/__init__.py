"""Image captioning without PyTorch: `Captioner.load(folder).caption("photo.jpg").text`."""

from capexport.captioner import Caption, Captioner, Timing
from capexport.decoding import DecodingOptions
from capexport.errors import (
    ArtifactError,
    ArtifactNotFoundError,
    CapexportError,
    CheckpointError,
    DeviceError,
    DownloadError,
    ImageError,
    ImageNotFoundError,
    MissingExtraError,
    OptionError,
    OutputExistsError,
    ParityError,
)
from capexport.preprocessing import ImageSpec

__version__ = "0.2.0.dev0"

__all__ = [
    "ArtifactError",
    "ArtifactNotFoundError",
    "CapexportError",
    "Caption",
    "Captioner",
    "CheckpointError",
    "DecodingOptions",
    "DeviceError",
    "DownloadError",
    "ImageError",
    "ImageNotFoundError",
    "ImageSpec",
    "MissingExtraError",
    "OptionError",
    "OutputExistsError",
    "ParityError",
    "Timing",
]
