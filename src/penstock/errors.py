"""Every error Penstock raises on purpose, split by who can act on it.

    PenstockError
      RequestError            the caller can fix it
        InvalidRequest          a parameter is missing, unknown, of the wrong type or out of range
        ContextTooLong          prompt and answer do not fit the model's context or the cache
        OverLimit               larger than this server allows (body, prompt, choices)
        InvalidImage            an image or video that cannot be had, read or seen
        ModelNotFound           no model of that name is served here
      ConfigError             the operator can fix it
        UnknownSetting          a setting nobody knows
        InvalidSetting          a setting with a value that cannot be honoured
        ModelUnreadable         a checkpoint that is missing, broken or of an unknown architecture
        KernelUnsupported       no kernel takes this dtype or shape
        MissingExtra            an optional part is not installed
        NotEnoughMemory         the model or its cache does not fit
        PortInUse               another process listens there
        InvalidRecipe           a compression recipe that cannot be followed
        CalibrationUnfit        calibration data that would mislead compression
        NotEnoughDisk           a compressed model does not fit on the disk
        NotRegistered           a model or version that the registry does not have
        NotVerified             a registered model whose files or signature are not what they were
      UnavailableError        wait or go elsewhere
        Overloaded              the queue is full
        DeadlineUnmeetable      the first token cannot come by the deadline
        Draining                shutting down, taking nothing new
        NotReady                loading or restarting
      InternalError           ours to fix
        WorkerDied              the engine process ended under a running request
        StepFailed              the model step failed for this request alone
        EncodingFailed          an image of this request could not be encoded

A message gives the fault, the value seen and the next step. Facts a program may use are attributes.
Lower packages know no HTTP: ``http/errors.py`` maps this tree to status codes.
"""

from typing import ClassVar


class PenstockError(Exception):
    """Root of the tree. ``code`` names the kind of error to programs, in logs and on the wire."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The request parameter or setting at fault, if one is."""
        self.retry_after_s = retry_after_s
        """When trying again may succeed, if waiting helps."""


class RequestError(PenstockError):
    """The caller can fix it."""

    code = "invalid_request"


class InvalidRequest(RequestError):
    """A parameter is missing, unknown, of the wrong type or out of range."""

    code = "invalid_request"


class ContextTooLong(RequestError):
    """Prompt and answer do not fit the model's context or the cache."""

    code = "context_length_exceeded"


class OverLimit(RequestError):
    """The request is larger than this server allows."""

    code = "request_too_large"


class InvalidImage(RequestError):
    """An image or video that cannot be had, read or seen."""

    code = "invalid_image"


class ModelNotFound(RequestError):
    """No model of that name is served here."""

    code = "model_not_found"


class ConfigError(PenstockError):
    """The operator can fix it."""

    code = "config_error"


class UnknownSetting(ConfigError):
    """A setting nobody knows."""

    code = "unknown_setting"


class InvalidSetting(ConfigError):
    """A setting with a value that cannot be honoured."""

    code = "invalid_setting"


class ModelUnreadable(ConfigError):
    """A checkpoint that is missing, broken or of an unknown architecture."""

    code = "model_unreadable"


class KernelUnsupported(ConfigError):
    """No kernel takes this dtype or shape."""

    code = "kernel_unsupported"


class MissingExtra(ConfigError):
    """An optional part is not installed."""

    code = "missing_extra"


class NotEnoughMemory(ConfigError):
    """The model or its cache does not fit."""

    code = "not_enough_memory"


class PortInUse(ConfigError):
    """Another process listens on the address."""

    code = "port_in_use"


class InvalidRecipe(ConfigError):
    """A compression recipe that cannot be followed."""

    code = "invalid_recipe"


class CalibrationUnfit(ConfigError):
    """Calibration data that would mislead compression."""

    code = "calibration_unfit"


class NotEnoughDisk(ConfigError):
    """A compressed model does not fit on the disk."""

    code = "not_enough_disk"


class NotRegistered(ConfigError):
    """A model or version that the registry does not have."""

    code = "not_registered"


class NotVerified(ConfigError):
    """A registered model whose files or signature are not what they were."""

    code = "not_verified"


class UnavailableError(PenstockError):
    """Wait or go elsewhere."""

    code = "unavailable"


class Overloaded(UnavailableError):
    """The queue is full."""

    code = "overloaded"


class DeadlineUnmeetable(UnavailableError):
    """The first token cannot come by the request's deadline."""

    code = "deadline_unmeetable"


class Draining(UnavailableError):
    """The server is shutting down and takes nothing new."""

    code = "draining"


class NotReady(UnavailableError):
    """The engine is loading or restarting."""

    code = "not_ready"


class InternalError(PenstockError):
    """Ours to fix."""

    code = "internal_error"


class WorkerDied(InternalError):
    """The engine process ended under a running request."""

    code = "worker_died"


class StepFailed(InternalError):
    """The model step failed for this request alone."""

    code = "step_failed"


class EncodingFailed(InternalError):
    """An image of this request could not be encoded."""

    code = "encoding_failed"


def _leaves(root: type[PenstockError]) -> list[type[PenstockError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _leaves(child))]


# A parent that shares a child's code comes first, so the child wins.
_BY_CODE = {kind.code: kind for kind in _leaves(PenstockError)}


def error_from_code(
    code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
) -> PenstockError:
    """Rebuild the error that another process sent by its ``code``; an unknown code is an ``InternalError``."""
    kind = _BY_CODE.get(code, InternalError)
    return kind(message, param=param, retry_after_s=retry_after_s)
