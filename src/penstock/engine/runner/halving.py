"""Finding the request that breaks a step, so that it fails alone."""

from penstock.engine.runner.base import Runner, StepResult
from penstock.engine.scheduler import ScheduledBatch
from penstock.errors import PenstockError, StepFailed
from penstock.telemetry import get_logger

_log = get_logger(__name__)

Results = list[tuple[ScheduledBatch, StepResult]]
"""Batches that ran, and what each gave"""


def execute_or_halve(runner: Runner, batch: ScheduledBatch) -> tuple[Results, dict[int, PenstockError]]:
    """Run a batch; if that raises, run halves of it, down to the sequence that breaks the step alone.

    Returns what ran, and by sequence what did not.
    """
    try:
        return [(batch, runner.execute(batch))], {}
    except Exception as error:  # whatever a model step can raise is one request's failure, never the engine's
        if batch.drafts:
            # A guess can break a step that what the model says would not.
            return execute_or_halve(runner, batch.without_drafts())
        num_sequences = len(batch.sequence_ids)
        if num_sequences == 1:
            _log.exception("step_failed", sequence_id=batch.sequence_ids[0], num_tokens=batch.num_tokens)
            failure = StepFailed(
                f"the model step failed for this request: {type(error).__name__}: {error}; the server goes on, and "
                "its log has the details"
            )
            return [], {batch.sequence_ids[0]: failure}
    middle = num_sequences // 2
    results, failures = execute_or_halve(runner, batch.select(range(middle)))
    more_results, more_failures = execute_or_halve(runner, batch.select(range(middle, num_sequences)))
    return results + more_results, failures | more_failures
