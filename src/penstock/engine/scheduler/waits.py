"""What sequences wait for in the queue."""

from penstock.engine.request import Sequence


class WaitClock:
    """Adds up the time between steps by what kept the queue from moving.

    A sequence's share is the difference between two readings, so that a step need not look at all that wait.
    """

    def __init__(self) -> None:
        self.reason = "step_tokens"
        """What keeps the queue until the next step"""
        self._totals_s = {"max_running": 0.0, "blocks": 0.0, "step_tokens": 0.0}
        self._last_step_s: float | None = None

    def step(self, now_s: float) -> None:
        """A step is decided now."""
        if self._last_step_s is not None:
            self._totals_s[self.reason] += now_s - self._last_step_s
        self._last_step_s = now_s

    def enter(self, sequence: Sequence, now_s: float) -> None:
        """A sequence begins to wait."""
        sequence.wait_marks = dict(self._totals_s)
        if self._last_step_s is not None:
            # What has passed of the current interval will be added to the totals, and was not this one's.
            sequence.wait_marks[self.reason] += now_s - self._last_step_s

    def leave(self, sequence: Sequence) -> None:
        """A sequence is let in by the step that was decided last: add to what it has waited, by reason."""
        for reason, total_s in self._totals_s.items():
            waited_s = total_s - sequence.wait_marks[reason]
            if waited_s > 0:
                sequence.waited_s[reason] = sequence.waited_s.get(reason, 0.0) + waited_s
