"""Every error that capexport raises on purpose. Each message says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class CapexportError(Exception):
    """Base of all errors below: catch it to catch them all."""


class ImageError(CapexportError, ValueError):
    """An image cannot be read: corrupt, truncated, empty, too large or of no known format."""


class ImageNotFoundError(ImageError, FileNotFoundError):
    """An image file does not exist."""


class ArtifactError(CapexportError, ValueError):
    """An exported folder is damaged, altered or of an unknown schema."""


class ArtifactNotFoundError(ArtifactError, FileNotFoundError):
    """A folder holds no artifact, or one of the artifact's files is missing."""


class CheckpointError(CapexportError, ValueError):
    """A PyTorch checkpoint is missing, damaged, or of a kind that cannot be exported."""


class DatasetError(CapexportError, ValueError):
    """A file of human captions, or a folder of photos with them, cannot be used."""


class OutputExistsError(CapexportError, FileExistsError):
    """The output is there already, or another run is writing it."""


class ParityError(CapexportError, ArithmeticError):
    """An exported graph does not reproduce its PyTorch model."""


class OptionError(CapexportError, ValueError):
    """An argument is of a wrong type, out of range, or doesn't suit the model."""


class DeviceError(CapexportError, RuntimeError):
    """The requested device, or its execution provider, is not available."""


class MissingExtraError(CapexportError, ImportError):
    """A package that an optional extra installs is not there, or cannot be loaded."""


class DownloadError(CapexportError, ConnectionError):
    """A model, weights or another package's files cannot be downloaded."""


@contextmanager
def importing(remedy: str) -> Iterator[None]:
    """A block that imports what an extra installs; `remedy` says what needs it, and how to get it.

    Raises:
        MissingExtraError: it is not installed, or it is installed and fails.
        KeyboardInterrupt: Ctrl-C, even if an extension module turned it into an ImportError.
    """
    try:
        yield
    except Exception as error:  # libraries that don't fit each other raise what they like
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise error.__cause__ from None
        if isinstance(error, ModuleNotFoundError):
            raise MissingExtraError(f"{remedy} ({error})") from error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise MissingExtraError(
            f"{remedy}; what is installed cannot be loaded: {reason}"
        ) from error
