"""Image captioning without PyTorch: `Captioner.load(folder).caption("photo.jpg").text`."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capexport.captioner import Alternative, Caption, Captioner, Timing
    from capexport.decoding import DecodingOptions
    from capexport.errors import (
        ArtifactError,
        ArtifactNotFoundError,
        CapexportError,
        CheckpointError,
        DatasetError,
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

# onnxruntime 1.31 and later report home unless this is set before they are imported, and their
# reporting thread hangs the exit of a forked process. What is set already stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.2.0.dev0"

__all__ = [
    "Alternative",
    "ArtifactError",
    "ArtifactNotFoundError",
    "CapexportError",
    "Caption",
    "Captioner",
    "CheckpointError",
    "DatasetError",
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

# The modules of all names but the errors.
_HOMES = {
    "Alternative": "captioner",
    "Caption": "captioner",
    "Captioner": "captioner",
    "Timing": "captioner",
    "DecodingOptions": "decoding",
    "ImageSpec": "preprocessing",
}
_MODULES = ("artifact", "captioner", "decoding", "errors", "families", "preprocessing", "sessions")


def __getattr__(name: str) -> Any:
    """Load what is asked for, and only then: numpy and Pillow take a while, in which the command
    line must be able to answer Ctrl-C."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value
