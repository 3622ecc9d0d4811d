"""Every error that capexport raises on purpose; each message says what to do."""


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
    """A checkpoint is missing, damaged or not one of capexport's."""


class DatasetError(CapexportError, ValueError):
    """A file of human captions, or a folder of photos with them, cannot be used."""


class OutputExistsError(CapexportError, FileExistsError):
    """The output is already there; capexport never overwrites it."""


class ParityError(CapexportError, ArithmeticError):
    """An exported graph does not reproduce its PyTorch model."""


class OptionError(CapexportError, ValueError):
    """An argument is of a wrong type, out of range, or doesn't suit the model."""


class DeviceError(CapexportError, RuntimeError):
    """The requested device, or its execution provider, is not available."""


class MissingExtraError(CapexportError, ImportError):
    """A package that an optional extra installs is not there."""


class DownloadError(CapexportError, ConnectionError):
    """Pretrained weights cannot be downloaded."""
